// Convolution of few source channels (a stem): the taps of a row are unfolded into one long row, so that they share one
// long product instead of many short ones.
#include <algorithm>
#include <vector>

#include "outer.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kUnfold = 128;    // rows that are unfolded and multiplied together
constexpr int64_t kSegment = 4096;  // rows that are unfolded before their share of the weight's gradient is added
constexpr int64_t kColumns = 48;    // unfolded columns of an item of the weight's gradient

// Copies `count` values, or writes zeros where there are none, by whole vectors of which the last may overlap.
template <typename T>
inline void copy_run(const T* from, int64_t count, T* to) {
  constexpr int64_t L = Vector<T>::lanes;
  if (count < L) {
    for (int64_t i = 0; i < count; ++i) to[i] = from ? from[i] : T(0);
    return;
  }
  for (int64_t i = 0; i < count; i += L) {
    const int64_t at = std::min(i, count - L);
    store(to + at, from ? load(from + at) : Vec<T>{});
  }
}

// For each query column the runs of taps whose source columns lie side by side in one patch, or beyond the border.
struct Runs {
  struct Run {
    int32_t tap, count, grid, in;
  };
  std::vector<Run> runs;
  std::vector<int64_t> first;  // of each column, and the end

  Runs(const Geometry& g, bool side_by_side) : first(1, 0) {
    for (int64_t x = 0; x < g.x.length; ++x) {
      for (int64_t kx = 0; kx < g.kw; ++kx) {
        const int32_t grid = g.x.grid[kx * g.x.length + x], in = g.x.in[kx * g.x.length + x];
        const bool starts = kx == 0 || !side_by_side || runs.back().grid != grid ||
                            (grid >= 0 && runs.back().in + runs.back().count != in);
        if (starts)
          runs.push_back({static_cast<int32_t>(kx), 1, grid, in});
        else
          ++runs.back().count;
      }
      first.push_back(runs.size());
    }
  }
};

// The values that query rows [begin, end) read, as (rows, taps * depth), 0 where there is none.
template <typename T>
void unfold(const Geometry& g, const Runs& runs, int64_t begin, int64_t end, const T* source, int64_t stride,
            int64_t depth, T* out) {
  for (int64_t row = begin; row < end; ++row) {
    const Place p = place_of(g, row);
    for (int64_t ky = 0; ky < g.kh; ++ky, out += g.kw * depth) {
      const int32_t gy = g.y.grid[ky * g.y.length + p.y];
      const int64_t in_y = g.y.in[ky * g.y.length + p.y];
      for (int64_t r = runs.first[p.x]; r < runs.first[p.x + 1]; ++r) {
        const Runs::Run& run = runs.runs[r];
        const int64_t patch = gy < 0 || run.grid < 0 ? -1 : p.grid[gy * g.gw + run.grid];
        const T* const from =
            patch < 0 ? nullptr : source + ((patch * g.source.height + in_y) * g.source.width + run.in) * stride;
        copy_run(from, run.count * depth, out + run.tap * depth);
      }
    }
  }
}

}  // namespace

template <typename T>
void conv_unfolded(const Geometry& g, const ConvShape& s, const T* source, const T* weight, const T* bias, T* query,
                   [[maybe_unused]] int threads) {
  constexpr int64_t C = panel_width<T>();
  const Panels panels(s.source_channels / s.groups, s.query_channels / s.groups, s.groups, C);
  const int64_t rows = g.rows(), chunks = (rows + kUnfold - 1) / kUnfold, depth = g.taps() * panels.depth;
  const Runs runs(g, s.groups == 1);
  std::vector<T> packed(panels.total * depth * C, T(0));  // [panels, taps, depth, panel]
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> left(kUnfold * depth), acc(kUnfold * C);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels.total; ++panel) {
      const int64_t column = panels.group(panel) * panels.width + panels.first(panel);
      for (int64_t c = 0; c < panels.used(panel); ++c)
        for (int64_t k = 0; k < panels.depth; ++k)
          for (int64_t t = 0; t < g.taps(); ++t)
            packed[((panel * g.taps() + t) * panels.depth + k) * C + c] =
                weight[((column + c) * panels.depth + k) * g.taps() + t];
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < chunks * s.groups; ++item) {
      const int64_t group = item % s.groups, begin = item / s.groups * kUnfold, count = std::min(rows - begin, kUnfold);
      unfold(g, runs, begin, begin + count, source + group * panels.depth, s.source_channels, panels.depth,
             left.data());
      for (int64_t panel = group * panels.per_group; panel < (group + 1) * panels.per_group; ++panel) {
        const int64_t used = panels.used(panel), column = group * panels.width + panels.first(panel);
        const BiasRow<T> start(bias, column, used);
        multiply<T>(
            count, depth, packed.data() + panel * depth * C, used, start.values,
            [&](int64_t i) { return left.data() + i * depth; }, [&](int64_t i) { return acc.data() + i * C; });
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(acc.data() + i * C, used, query + (begin + i) * s.query_channels + column);
      }
    }
  }
}

template <typename T>
void conv_unfolded_grad_weight(const Geometry& g, const ConvShape& s, const T* source, const T* grad, T* weight,
                               [[maybe_unused]] int threads) {
  constexpr int64_t C = panel_width<T>();
  const Panels panels(s.source_channels / s.groups, s.query_channels / s.groups, s.groups, C);
  const int64_t depth = g.taps() * panels.depth, blocks = (depth + kColumns - 1) / kColumns, rows = g.rows();
  const int64_t segment = std::min(rows, kSegment);
  const Runs runs(g, s.groups == 1);
  std::vector<T> sum(panels.total * depth * C, T(0)), left(segment * depth);
#pragma omp parallel num_threads(threads)
  {
    Tiles<T> tiles(kColumns);
    std::vector<T> right(kChunk * C);
    for (int64_t group = 0; group < s.groups; ++group) {
      for (int64_t begin = 0; begin < rows; begin += segment) {
        const int64_t count = std::min(segment, rows - begin);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i += kUnfold)
          unfold(g, runs, begin + i, begin + std::min(count, i + kUnfold), source + group * panels.depth,
                 s.source_channels, panels.depth, left.data() + i * depth);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < blocks * panels.per_group; ++item) {
          const int64_t panel = group * panels.per_group + item % panels.per_group, used = panels.used(panel);
          const int64_t first = item / panels.per_group * kColumns, height = std::min(kColumns, depth - first);
          const T* const from = grad + begin * s.query_channels + group * panels.width + panels.first(panel);
          for (int64_t i = 0; i < count; i += kChunk) {
            const int64_t pairs = std::min(kChunk, count - i);
            tiles.pack(height, pairs, left.data() + i * depth + first, depth);
            for (int64_t p = 0; p < pairs; ++p) pack_row(from + (i + p) * s.query_channels, used, right.data() + p * C);
            outer(height, tiles, nullptr, right.data(), pairs, used, sum.data() + (panel * depth + first) * C, C,
                  false);
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels.total; ++panel) {
      const int64_t column = panels.group(panel) * panels.width + panels.first(panel);
      for (int64_t c = 0; c < panels.used(panel); ++c)
        for (int64_t k = 0; k < panels.depth; ++k)
          for (int64_t t = 0; t < g.taps(); ++t)
            weight[((column + c) * panels.depth + k) * g.taps() + t] =
                sum[((panel * g.taps() + t) * panels.depth + k) * C + c];
    }
  }
}

#define SPARK_INSTANTIATE(T)                                                                                \
  template void conv_unfolded<T>(const Geometry&, const ConvShape&, const T*, const T*, const T*, T*, int); \
  template void conv_unfolded_grad_weight<T>(const Geometry&, const ConvShape&, const T*, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
