// Depthwise convolution on packed rows (also average pooling, with weights of one).
#include <algorithm>
#include <vector>

#include "depthwise_lines.h"
#include "neighbours.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kBlockRows = 32;    // rows whose neighbours are found once for all channels
constexpr int kVectors = 4;           // channel vectors that are accumulated together
constexpr int64_t kMostVectors = 16;  // whose weight's gradient is summed together

// The taps of each row of a block that have a source: [row][i] -> (tap, source row).
struct Sources {
  std::vector<int64_t> source;
  std::vector<int32_t> tap;
  std::vector<int64_t> count;
  int64_t taps;

  explicit Sources(int64_t taps)
      : source(kBlockRows * taps + 1), tap(kBlockRows * taps + 1), count(kBlockRows), taps(taps) {}

  void find(const Geometry& g, const Neighbours& neighbours, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < end - begin; ++i) {
      int64_t* const rows = source.data() + i * taps;
      int32_t* const at = tap.data() + i * taps;
      int64_t n = 0;
      neighbours.each(place_of(g, begin + i), [&](int64_t row, bool active, int64_t tap_of_row) {
        rows[n] = row;
        at[n] = static_cast<int32_t>(tap_of_row);
        n += active;  // whether it is active is hard to foresee: no branch
      });
      count[i] = n;
    }
  }
};

// to[0 .. N vectors) = start + sum of source * weight over the row's neighbours.
template <typename T, int N>
inline void row_sum(const Sources& near, int64_t i, int64_t channels, const T* source, const T* weight, const T* start,
                    T* to) {
  typedef typename Vector<T>::type V;
  constexpr int L = Vector<T>::lanes;
  V sum[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) sum[v] = start ? load(start + v * L) : V{};
  for (int64_t n = i * near.taps; n < i * near.taps + near.count[i]; ++n) {
    const T* x = source + near.source[n] * channels;
    const T* w = weight + near.tap[n] * channels;
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[v] += load(x + v * L) * load(w + v * L);
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) store(to + v * L, sum[v]);
}

template <typename T>
inline void row_sum_scalar(const Sources& near, int64_t i, int64_t channels, const T* source, const T* weight,
                           const T* start, T* to) {
  T sum = start ? *start : T(0);
  for (int64_t n = i * near.taps; n < i * near.taps + near.count[i]; ++n)
    sum += source[near.source[n] * channels] * weight[near.tap[n] * channels];
  *to = sum;
}

constexpr int64_t kLines = 16;           // query lines whose columns are found together
constexpr int64_t kWeightBytes = 16384;  // of the vectors of channels that a segment is taken through at once
constexpr int64_t kGroup = 8;            // vectors of channels in an item of the weight's gradient
constexpr int64_t kItems = 32;

// The vectors that channels are cut into; the last may overlap the one before.
template <typename T>
struct Vectors {
  static constexpr int64_t L = Vector<T>::lanes;
  int64_t channels, count;

  explicit Vectors(int64_t channels) : channels(channels), count((channels + L - 1) / L) {}

  int64_t first(int64_t v) const { return std::min(v * L, channels - L); }
};

// Source lines, without those that hold nothing, in groups: of a query line, or of a row of the kernel.
struct Found {
  int64_t most;
  std::vector<const int64_t*> columns;
  std::vector<int64_t> rows, count;

  Found(int64_t groups, int64_t most) : most(most), columns(groups * most), rows(groups * most), count(groups) {}

  void add(int64_t group, const int64_t* line, int64_t row) {
    if (!line) return;
    columns[group * most + count[group]] = line;
    rows[group * most + count[group]++] = row;
  }

  template <typename T>
  Reads<T> reads(int64_t group, const T* source, const T* factor, int64_t second) const {
    return {count[group], columns.data() + group * most, rows.data() + group * most, source, factor, second};
  }
};

// Pixels [t, t + S) of a line of the query, the channels of vectors [v, last).
template <typename T, int S, int N, int K, int Step>
inline int64_t gather_vectors(const Vectors<T>& vectors, int64_t v, int64_t last, const Found& found, int64_t line,
                              const int64_t* taps, int64_t t, const T* source, const T* weight, const T* bias, T* to,
                              int64_t stride) {
  for (; v + N <= last; v += N) {
    const int64_t c = vectors.first(v), second = vectors.first(v + N - 1) - c;
    gather_segment<T, S, N, K, Step>(found.reads(line, source + c, weight + c, second), taps, t * Step,
                                     bias ? bias + c : nullptr, to + c, stride);
  }
  return v;
}

template <typename T>
void gather_block(const Pattern& pattern, const Vectors<T>& vectors, const Found& found, int64_t lines, int64_t group,
                  const int64_t* taps, const T* source, const T* weight, const T* bias, T* query, int64_t width) {
  const int64_t stride = pattern.every * vectors.channels;
  with_sizes(pattern, [&](auto size, auto kernel, auto step) {
    constexpr int S = decltype(size)::value, K = decltype(kernel)::value, Step = decltype(step)::value;
    constexpr int N = vectors_together<S, K>();
    for (int64_t first = 0; first < vectors.count; first += group)
      for (int64_t line = 0; line < lines; ++line)
        for (int64_t t = 0; t < pattern.count; t += S) {
          const int64_t last = std::min(vectors.count, first + group);
          T* const to = query + line * width + t * stride;
          const int64_t v = gather_vectors<T, S, N, K, Step>(vectors, first, last, found, line, taps, t, source, weight,
                                                             bias, to, stride);
          gather_vectors<T, S, 1, K, Step>(vectors, v, last, found, line, taps, t, source, weight, bias, to, stride);
        }
  });
}

template <typename T>
void gather_lines(const Geometry& g, const std::vector<Pattern>& patterns, int64_t channels, const T* source,
                  const T* weight, const T* bias, T* query, [[maybe_unused]] int threads) {
  const int64_t all = g.patches * g.query.height, width = g.query.width * channels;
  const Vectors<T> vectors(channels);
  const int64_t group = std::max<int64_t>(2, kWeightBytes / (g.taps() * kVectorBytes) / 2 * 2);
#pragma omp parallel num_threads(threads)
  {
    std::vector<Lines> lines;
    std::vector<std::vector<int64_t>> taps;
    for (const Pattern& pattern : patterns) {
      lines.emplace_back(g, pattern, channels, kLines);
      taps.push_back(pattern.taps);
      for (int64_t& kx : taps.back()) kx *= channels;
    }
    Found found(kLines, g.kh);
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < all; begin += kLines) {
      const int64_t count = std::min(kLines, all - begin);
      for (size_t i = 0; i < patterns.size(); ++i) {
        lines[i].find(begin, count);
        std::fill(found.count.begin(), found.count.end(), 0);
        for (int64_t line = 0; line < count; ++line)
          for (int64_t ky = 0; ky < g.kh; ++ky) found.add(line, lines[i].columns(line, ky), ky * g.kw * channels);
        gather_block(patterns[i], vectors, found, count, group, taps[i].data(), source, weight, bias,
                     query + begin * width + patterns[i].first * channels, width);
      }
    }
  }
}

// The gradient of the weight of a few vectors of channels, from a share of the lines: sums [vector, tap, lane].
template <typename T>
class LineGradient {
 public:
  LineGradient(const Geometry& g, const Pattern& pattern, int64_t channels)
      : g_(g), pattern_(pattern), vectors_(channels), blocks_((g.patches * g.query.height + kLines - 1) / kLines) {
    const int64_t groups = (vectors_.count + kGroup - 1) / kGroup;
    splits_ = std::max<int64_t>(1, std::min(kItems / groups, blocks_ / 2));
    items_ = splits_ * groups;
    sums_.resize(items_ * size());
  }

  int64_t items() const { return items_; }

  void run(int64_t item, const T* source, const T* query, Lines& lines, Found& found) {
    const int64_t split = item % splits_, first = item / splits_ * kGroup;
    const int64_t all = g_.patches * g_.query.height, width = g_.query.width * vectors_.channels;
    const int64_t last = std::min(vectors_.count, first + kGroup);
    for (int64_t block = blocks_ * split / splits_; block < blocks_ * (split + 1) / splits_; ++block) {
      const int64_t begin = block * kLines, count = std::min(kLines, all - begin);
      lines.find(begin, count);
      std::fill(found.count.begin(), found.count.end(), 0);
      for (int64_t ky = 0; ky < g_.kh; ++ky)
        for (int64_t line = 0; line < count; ++line) found.add(ky, lines.columns(line, ky), (begin + line) * width);
      with_sizes(pattern_, [&](auto size, auto kernel, auto step) {
        constexpr int S = decltype(size)::value, K = decltype(kernel)::value, Step = decltype(step)::value;
        constexpr int N = vectors_together<S, K>();
        int64_t v = first;
        for (; v + N <= last; v += N) add<S, N, K, Step>(v, sums_of(item, v - first), found, source, query);
        for (; v < last; ++v) add<S, 1, K, Step>(v, sums_of(item, v - first), found, source, query);
      });
    }
  }

  // Writes grad [tap, channel] of vector v, without what it shares with the one before.
  void finish(int64_t v, T* grad) const {
    const int64_t c = vectors_.first(v), shared = v * L - c;
    for (int64_t tap = 0; tap < g_.taps(); ++tap) {
      T sum[L] = {};
      for (int64_t split = 0; split < splits_; ++split) {
        const T* const from = sums_of(v / kGroup * splits_ + split, v % kGroup) + tap * L;
        for (int64_t l = 0; l < L; ++l) sum[l] += from[l];
      }
      std::copy(sum + shared, sum + L, grad + tap * vectors_.channels + c + shared);
    }
  }

  int64_t vectors() const { return vectors_.count; }

 private:
  static constexpr int64_t L = Vector<T>::lanes;

  int64_t size() const { return kGroup * g_.taps() * L; }
  T* sums_of(int64_t item, int64_t v) { return sums_.data() + item * size() + v * g_.taps() * L; }
  const T* sums_of(int64_t item, int64_t v) const { return sums_.data() + item * size() + v * g_.taps() * L; }

  template <int S, int N, int K, int Step>
  void add(int64_t v, T* sums, const Found& found, const T* source, const T* query) {
    const int64_t c = vectors_.first(v), second = vectors_.first(v + N - 1) - c;
    const int64_t stride = pattern_.every * vectors_.channels;
    for (int64_t ky = 0; ky < g_.kh; ++ky)
      for (int64_t t = 0; t < pattern_.count; t += S)
        gradient_segment<T, S, N, K, Step>(found.reads(ky, source + c, query + c + t * stride, second), t * Step,
                                           stride, sums + ky * g_.kw * L, g_.taps() * L);
  }

  const Geometry& g_;
  const Pattern& pattern_;
  Vectors<T> vectors_;
  int64_t blocks_, splits_, items_;
  std::vector<T> sums_;
};

template <typename T>
void lines_grad_weight(const Geometry& g, const Pattern& pattern, int64_t channels, const T* source, const T* query,
                       T* grad, [[maybe_unused]] int threads) {
  LineGradient<T> gradient(g, pattern, channels);
#pragma omp parallel num_threads(threads)
  {
    Lines lines(g, pattern, channels, kLines);
    Found found(g.kh, kLines);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < gradient.items(); ++item) gradient.run(item, source, query, lines, found);
#pragma omp for schedule(static)
    for (int64_t v = 0; v < gradient.vectors(); ++v) gradient.finish(v, grad);
  }
}

}  // namespace

template <typename T>
void depthwise_gather(const Geometry& g, const WindowX& window, int64_t channels, const T* source, const T* weight,
                      const T* bias, T* query, [[maybe_unused]] int threads) {
  constexpr int64_t L = Vector<T>::lanes;
  if constexpr (sizeof(T) == sizeof(float)) {
    const std::vector<Pattern> found = patterns(g, window, channels, L);
    if (!found.empty()) return gather_lines(g, found, channels, source, weight, bias, query, threads);
  }
  const int64_t rows = g.rows(), blocks = (rows + kBlockRows - 1) / kBlockRows;
  const Neighbours neighbours(g);
#pragma omp parallel num_threads(threads)
  {
    Sources near(g.taps());
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kBlockRows, end = std::min(rows, begin + kBlockRows);
      near.find(g, neighbours, begin, end);
      int64_t c = 0;
      const auto sweep = [&](auto body, int64_t step) {
        for (; c + step <= channels; c += step)
          for (int64_t i = 0; i < end - begin; ++i)
            body(near, i, channels, source + c, weight + c, bias ? bias + c : nullptr,
                 query + (begin + i) * channels + c);
      };
      sweep(row_sum<T, kVectors>, kVectors * L);
      sweep(row_sum<T, 1>, L);
      sweep(row_sum_scalar<T>, 1);
    }
  }
}

template <typename T>
void depthwise_grad_weight(const Geometry& g, const WindowX& window, int64_t channels, const T* source, const T* query,
                           T* grad, [[maybe_unused]] int threads) {
  typedef typename Vector<T>::type V;
  constexpr int64_t L = Vector<T>::lanes;
  if constexpr (sizeof(T) == sizeof(float)) {
    const std::vector<Pattern> found = patterns(g, window, channels, L);
    if (!found.empty()) return lines_grad_weight(g, found[0], channels, source, query, grad, threads);
  }
  // A few channels at a time, so that their sums of all taps stay in the cache; channels are shared out among threads.
  const int64_t vectors = (channels + L - 1) / L, share = (vectors + threads - 1) / threads;
  const int64_t together = std::min(kMostVectors, std::max<int64_t>(1, share)) * L;
  const int64_t rows = g.rows(), taps = g.taps(), parts = (channels + together - 1) / together;
  const Neighbours neighbours(g);
#pragma omp parallel num_threads(threads)
  {
    Sources near(taps);
    std::vector<T> sum(taps * together);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * together, width = std::min(together, channels - first);
      std::fill(sum.begin(), sum.end(), T(0));
      for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
        const int64_t end = std::min(rows, begin + kBlockRows);
        near.find(g, neighbours, begin, end);
        for (int64_t i = 0; i < end - begin; ++i) {
          const T* dy = query + (begin + i) * channels + first;
          for (int64_t n = i * taps; n < i * taps + near.count[i]; ++n) {
            const T* x = source + near.source[n] * channels + first;
            T* acc = sum.data() + near.tap[n] * together;
            int64_t c = 0;
            for (; c + L <= width; c += L) {
              const V v = load(acc + c) + load(x + c) * load(dy + c);
              store(acc + c, v);
            }
            for (; c < width; ++c) acc[c] += x[c] * dy[c];
          }
        }
      }
      for (int64_t t = 0; t < taps; ++t) std::copy_n(sum.data() + t * together, width, grad + t * channels + first);
    }
  }
}

#define SPARK_INSTANTIATE(T)                                                                                          \
  template void depthwise_gather<T>(const Geometry&, const WindowX&, int64_t, const T*, const T*, const T*, T*, int); \
  template void depthwise_grad_weight<T>(const Geometry&, const WindowX&, int64_t, const T*, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
