// Max pooling on packed rows. A masked neighbour counts as 0, as on a zero-filled map; beyond the border is -inf.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace spark {
namespace SPARK_ISA {

template <typename T>
void max_pool_forward(const Geometry& g, int64_t channels, const T* source, T* query, int16_t* argmax,
                      [[maybe_unused]] int threads) {
  const int64_t rows = g.rows();
#pragma omp parallel num_threads(threads)
  {
    const std::vector<T> zeros(channels, T(0));
#pragma omp for schedule(static)
    for (int64_t q = 0; q < rows; ++q) {
      const Place place = place_of(g, q);
      T* best = query + q * channels;
      int16_t* which = argmax + q * channels;
      bool first = true;
      for (int64_t ky = 0; ky < g.kh; ++ky) {
        for (int64_t kx = 0; kx < g.kw; ++kx) {
          const int64_t row = source_row(g, place, ky, kx);
          if (row == kOutside) continue;
          const T* x = row < 0 ? zeros.data() : source + row * channels;
          const int16_t tap = static_cast<int16_t>(ky * g.kw + kx);
          if (first) {
            std::copy_n(x, channels, best);
            std::fill_n(which, channels, tap);
            first = false;
            continue;
          }
          for (int64_t c = 0; c < channels; ++c) {
            const bool wins = x[c] > best[c] || x[c] != x[c];  // the first of equals stays; NaN wins
            which[c] = wins ? tap : which[c];
            best[c] = wins ? x[c] : best[c];
          }
        }
      }
      if (first) {  // a window wholly in the padding
        std::fill_n(best, channels, -std::numeric_limits<T>::infinity());
        std::fill_n(which, channels, int16_t(-1));
      }
    }
  }
}

template <typename T>
void max_pool_grad_input(const Geometry& g, int64_t channels, const T* grad, const int16_t* argmax, T* query,
                         [[maybe_unused]] int threads) {
  const int64_t rows = g.rows();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t q = 0; q < rows; ++q) {
    const Place place = place_of(g, q);
    T* sum = query + q * channels;
    std::fill_n(sum, channels, T(0));
    for (int64_t ky = 0; ky < g.kh; ++ky) {
      for (int64_t kx = 0; kx < g.kw; ++kx) {
        const int64_t row = source_row(g, place, ky, kx);
        if (row < 0) continue;
        const T* dy = grad + row * channels;
        const int16_t* which = argmax + row * channels;
        const int16_t tap = static_cast<int16_t>(ky * g.kw + kx);
        for (int64_t c = 0; c < channels; ++c) sum[c] += which[c] == tap ? dy[c] : T(0);
      }
    }
  }
}

#define SPARK_INSTANTIATE(T)                                                                \
  template void max_pool_forward<T>(const Geometry&, int64_t, const T*, T*, int16_t*, int); \
  template void max_pool_grad_input<T>(const Geometry&, int64_t, const T*, const int16_t*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
