// Depthwise convolution line by line, for kernels that are dense along x: consecutive pixels of a query line read
// consecutive columns of a few source lines, so that each loaded vector serves several taps from registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace spark {
namespace SPARK_ISA {

// Which column a pixel reads: pixel first + t * every of a query line, t < count, reads column t * step + m through the
// tap taps[m] of a kernel's row.
struct Pattern {
  int64_t first, every, count, step;
  std::vector<int64_t> taps;

  int64_t kernel() const { return static_cast<int64_t>(taps.size()); }
  int64_t columns() const { return (count - 1) * step + kernel(); }
  int64_t segment() const { return count % 8 == 0 ? 8 : count % 4 == 0 ? 4 : 2; }  // pixels handled together
};

// The patterns that make up a query line; none where a line does not lend itself to it.
inline std::vector<Pattern> patterns(const Geometry& g, const WindowX& window, int64_t channels, int64_t lanes) {
  const int64_t width = g.query.width, every = window.transposed ? window.stride : 1;
  if (window.dilation != 1 || window.stride > 2 || channels < lanes || width % (2 * every)) return {};
  std::vector<Pattern> found;
  for (int64_t first = 0; first < every; ++first) {
    Pattern pattern{first, every, width / every, window.transposed ? 1 : window.stride, {}};
    if (window.transposed)
      for (int64_t kx = g.kw - 1; kx >= 0; --kx) {
        if ((first + window.padding - kx) % every == 0) pattern.taps.push_back(kx);
      }
    else
      for (int64_t kx = 0; kx < g.kw; ++kx) pattern.taps.push_back(kx);
    const int64_t kernel = pattern.kernel();
    if (kernel < pattern.step || kernel == 0 || kernel == 6 || kernel > 7 || (kernel == 4 && pattern.step == 2))
      return {};
    found.push_back(pattern);
  }
  return found;
}

// The source columns that the lines [begin, begin + count) of the query read under a pattern.
class Lines {
 public:
  Lines(const Geometry& g, const Pattern& pattern, int64_t channels, int64_t most)
      : g_(g), pattern_(pattern), channels_(channels), columns_(pattern.columns()), in_(pattern.columns()),
        line_of_(g.gh * g.source.height), index_(most * g.kh), offsets_(most * g.kh * pattern.columns()) {}

  void find(int64_t begin, int64_t count) {
    used_ = 0;
    for (int64_t line = begin; line < begin + count; ++line) {
      const int64_t patch = line / g_.query.height;
      const int32_t* coords = g_.coords + 3 * patch;
      if (line == begin || line % g_.query.height == 0) enter(coords[2]);
      const int32_t* grid = g_.grid_to_patch + coords[0] * g_.gh * g_.gw;
      const int64_t y = coords[1] * g_.query.height + line % g_.query.height;
      for (int64_t ky = 0; ky < g_.kh; ++ky) {
        const int64_t at = ky * g_.y.length + y, row = g_.y.grid[at];
        int64_t& index = index_[(line - begin) * g_.kh + ky];
        index = row < 0 ? kNone : source_line(grid + row * g_.gw, row * g_.source.height + g_.y.in[at], g_.y.in[at]);
      }
    }
  }

  // Offsets of the columns' values in the source, negative where there is none; null if there is none at all.
  const int64_t* columns(int64_t line, int64_t ky) const {
    const int64_t index = index_[line * g_.kh + ky];
    return index < 0 ? nullptr : offsets_.data() + index;
  }

 private:
  static constexpr int64_t kNone = -1, kUnknown = -2;

  struct Run {
    int64_t grid, begin, end;  // the grid column of the columns [begin, end)
  };

  void enter(int64_t patch_column) {
    std::fill(line_of_.begin(), line_of_.end(), kUnknown);
    runs_.clear();
    for (int64_t p = 0; p < columns_; ++p) {
      const int64_t t = std::min(p / pattern_.step, pattern_.count - 1), m = p - t * pattern_.step;
      const int64_t x = patch_column * g_.query.width + pattern_.first + t * pattern_.every;
      const int64_t at = pattern_.taps[m] * g_.x.length + x, grid = g_.x.grid[at];
      if (runs_.empty() || runs_.back().grid != grid) runs_.push_back({grid, p, p});
      runs_.back().end = p + 1;
      in_[p] = g_.x.in[at] * channels_;
    }
  }

  int64_t source_line(const int32_t* grid_row, int64_t y, int64_t y_in) {
    if (line_of_[y] != kUnknown) return line_of_[y];
    int64_t* const to = offsets_.data() + used_;
    bool any = false;
    for (const Run& run : runs_) {
      const int64_t patch = run.grid < 0 ? -1 : grid_row[run.grid];
      const int64_t first = (patch * g_.source.height + y_in) * g_.source.width * channels_;
      any |= patch >= 0;
      for (int64_t p = run.begin; p < run.end; ++p) to[p] = patch < 0 ? -1 : first + in_[p];
    }
    line_of_[y] = any ? used_ : kNone;
    used_ += any ? columns_ : 0;
    return line_of_[y];
  }

  const Geometry& g_;
  const Pattern& pattern_;
  int64_t channels_, columns_;
  std::vector<Run> runs_;
  std::vector<int64_t> in_, line_of_, index_, offsets_;
  int64_t used_ = 0;
};

// What a segment of a query line reads: `lines` source lines, each with its columns and a row of what they are
// multiplied by, the kernel's or (for the kernel's gradient) the query's. The second vector of channels is `second`
// further.
template <typename T>
struct Reads {
  int64_t lines;
  const int64_t* const* columns;
  const int64_t* rows;
  const T *source, *factor;
  int64_t second;
};

// Vectors of channels that S pixels and K taps leave registers for.
template <int S, int K>
constexpr int vectors_together() {
  return (kVectorBytes == 64 ? S + K <= 15 : S <= 4) ? 2 : 1;
}

// to[j, n] = start[n] + sum over lines and taps of a column times a weight, for S pixels and N vectors.
template <typename T, int S, int N, int K, int Step>
SPARK_NOINLINE void gather_segment(const Reads<T>& reads, const int64_t* taps, int64_t column, const T* start, T* to,
                                   int64_t stride) {
  typedef typename Vector<T>::type V;
  V sum[S][N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const V first = start ? load(start + n * reads.second) : V{};
#pragma GCC unroll 8
    for (int j = 0; j < S; ++j) sum[j][n] = first;
  }
  for (int64_t line = 0; line < reads.lines; ++line) {
    const int64_t* const offsets = reads.columns[line] + column;
    V weight[K][N];
#pragma GCC unroll 8
    for (int m = 0; m < K; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) weight[m][n] = load(reads.factor + reads.rows[line] + taps[m] + n * reads.second);
#pragma GCC unroll 24
    for (int p = 0; p < (S - 1) * Step + K; ++p) {
      if (offsets[p] < 0) continue;
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const V value = load(reads.source + offsets[p] + n * reads.second);
        __builtin_prefetch(reads.source + offsets[p] + (N + n) * Vector<T>::lanes);
#pragma GCC unroll 8
        for (int j = 0; j < S; ++j)
          if (p - j * Step >= 0 && p - j * Step < K) sum[j][n] += value * weight[p - j * Step][n];
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < S; ++j)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(to + j * stride + n * reads.second, sum[j][n]);
}

// sums[n * second_sums + m vectors] += sum over lines and pixels of column * query, for K taps and N vectors; the
// query's pixels are `stride` apart.
template <typename T, int S, int N, int K, int Step>
SPARK_NOINLINE void gradient_segment(const Reads<T>& reads, int64_t column, int64_t stride, T* sums,
                                     int64_t second_sums) {
  typedef typename Vector<T>::type V;
  constexpr int64_t L = Vector<T>::lanes;
  V sum[K][N];
#pragma GCC unroll 8
  for (int m = 0; m < K; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = load(sums + n * second_sums + m * L);
  for (int64_t line = 0; line < reads.lines; ++line) {
    const int64_t* const offsets = reads.columns[line] + column;
    V query[S][N];
#pragma GCC unroll 8
    for (int j = 0; j < S; ++j)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) query[j][n] = load(reads.factor + reads.rows[line] + j * stride + n * reads.second);
#pragma GCC unroll 24
    for (int p = 0; p < (S - 1) * Step + K; ++p) {
      if (offsets[p] < 0) continue;
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const V value = load(reads.source + offsets[p] + n * reads.second);
#pragma GCC unroll 8
        for (int j = 0; j < S; ++j)
          if (p - j * Step >= 0 && p - j * Step < K) sum[p - j * Step][n] += value * query[j][n];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < K; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(sums + n * second_sums + m * L, sum[m][n]);
}

// Calls call(constants S, K, Step) for the sizes of a pattern.
template <int N>
using Constant = std::integral_constant<int, N>;

template <typename Call>
inline void with_sizes(const Pattern& pattern, Call call) {
  const auto with_step = [&](auto size, auto kernel) {
    if (pattern.step == 1)
      call(size, kernel, Constant<1>{});
    else if constexpr (decltype(kernel)::value >= 2 && decltype(kernel)::value != 4)
      call(size, kernel, Constant<2>{});
  };
  const auto with_kernel = [&](auto size) {
    switch (pattern.kernel()) {
      case 1: return with_step(size, Constant<1>{});
      case 2: return with_step(size, Constant<2>{});
      case 3: return with_step(size, Constant<3>{});
      case 4: return with_step(size, Constant<4>{});
      case 5: return with_step(size, Constant<5>{});
      default: return with_step(size, Constant<7>{});
    }
  };
  switch (pattern.segment()) {
    case 8: return with_kernel(Constant<8>{});
    case 4: return with_kernel(Constant<4>{});
    default: return with_kernel(Constant<2>{});
  }
}

}  // namespace SPARK_ISA
}  // namespace spark
