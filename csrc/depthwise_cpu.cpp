// Depthwise convolution on packed rows (also average pooling, with weights of one).
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kBlockRows = 32;  // rows whose neighbours are found once for all channels
constexpr int kVectors = 4;         // channel vectors that are accumulated together

// The taps of each row of a block that have a source: [row][i] -> (tap, source row).
struct Neighbours {
  std::vector<int64_t> source;
  std::vector<int32_t> tap;
  std::vector<int64_t> count;
  int64_t taps;

  explicit Neighbours(int64_t taps)
      : source(kBlockRows * taps), tap(kBlockRows * taps), count(kBlockRows), taps(taps) {}

  void find(const Geometry& g, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < end - begin; ++i) {
      const Place place = place_of(g, begin + i);
      int64_t n = 0;
      for (int64_t ky = 0; ky < g.kh; ++ky) {
        for (int64_t kx = 0; kx < g.kw; ++kx) {
          const int64_t row = source_row(g, place, ky, kx);
          if (row < 0) continue;
          source[i * taps + n] = row;
          tap[i * taps + n++] = static_cast<int32_t>(ky * g.kw + kx);
        }
      }
      count[i] = n;
    }
  }
};

// to[0 .. N vectors) = start + sum of source * weight over the row's neighbours.
template <typename T, int N>
inline void row_sum(const Neighbours& near, int64_t i, int64_t channels, const T* source, const T* weight,
                    const T* start, T* to) {
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
inline void row_sum_scalar(const Neighbours& near, int64_t i, int64_t channels, const T* source, const T* weight,
                           const T* start, T* to) {
  T sum = start ? *start : T(0);
  for (int64_t n = i * near.taps; n < i * near.taps + near.count[i]; ++n)
    sum += source[near.source[n] * channels] * weight[near.tap[n] * channels];
  *to = sum;
}

}  // namespace

template <typename T>
void depthwise_gather(const Geometry& g, int64_t channels, const T* source, const T* weight, const T* bias, T* query,
                      [[maybe_unused]] int threads) {
  constexpr int64_t L = Vector<T>::lanes;
  const int64_t rows = g.rows(), blocks = (rows + kBlockRows - 1) / kBlockRows;
#pragma omp parallel num_threads(threads)
  {
    Neighbours near(g.taps());
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kBlockRows, end = std::min(rows, begin + kBlockRows);
      near.find(g, begin, end);
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
void depthwise_grad_weight(const Geometry& g, int64_t channels, const T* source, const T* query, T* grad,
                           [[maybe_unused]] int threads) {
  typedef typename Vector<T>::type V;
  constexpr int64_t L = Vector<T>::lanes;
  // A few channels at a time, so that their sums of all taps stay in the cache; channels are shared out among threads.
  constexpr int64_t kChannels = kVectors * L;
  const int64_t rows = g.rows(), taps = g.taps(), parts = (channels + kChannels - 1) / kChannels;
#pragma omp parallel num_threads(threads)
  {
    Neighbours near(taps);
    std::vector<T> sum(taps * kChannels);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * kChannels, width = std::min(kChannels, channels - first);
      std::fill(sum.begin(), sum.end(), T(0));
      for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
        const int64_t end = std::min(rows, begin + kBlockRows);
        near.find(g, begin, end);
        for (int64_t i = 0; i < end - begin; ++i) {
          const T* dy = query + (begin + i) * channels + first;
          for (int64_t n = i * taps; n < i * taps + near.count[i]; ++n) {
            const T* x = source + near.source[n] * channels + first;
            T* acc = sum.data() + near.tap[n] * kChannels;
            int64_t c = 0;
            for (; c + L <= width; c += L) {
              const V v = load(acc + c) + load(x + c) * load(dy + c);
              store(acc + c, v);
            }
            for (; c < width; ++c) acc[c] += x[c] * dy[c];
          }
        }
      }
      for (int64_t t = 0; t < taps; ++t) std::copy_n(sum.data() + t * kChannels, width, grad + t * channels + first);
    }
  }
}

#define SPARK_INSTANTIATE(T)                                                                          \
  template void depthwise_gather<T>(const Geometry&, int64_t, const T*, const T*, const T*, T*, int); \
  template void depthwise_grad_weight<T>(const Geometry&, int64_t, const T*, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
