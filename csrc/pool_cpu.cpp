// Max pooling on packed rows. A masked neighbour counts as 0, as on a zero-filled map; beyond the border is -inf.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "neighbours.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int kTogether = 4;  // vectors of channels

// Lanes of taps: as wide as T while they are compared, 16 bits in memory.
template <typename T>
struct TapVector {
  typedef decltype(typename Vector<T>::type{} > typename Vector<T>::type{}) wide;
  typedef int16_t narrow __attribute__((vector_size(Vector<T>::lanes * sizeof(int16_t))));
};

// What the taps of a row read: `count` rows of channels and which taps they are.
template <typename T>
struct Sources {
  std::vector<const T*> values;
  std::vector<const int16_t*> taken;  // of the gradient: the winning taps of that row
  std::vector<int16_t> tap;
  int64_t count = 0;

  explicit Sources(int64_t taps) : values(taps + 1), taken(taps + 1), tap(taps + 1) {}
};

// N vectors of the highest value and its tap: the first of equals stays; NaN wins.
template <typename T, int N>
inline void highest_vectors(const Sources<T>& from, int64_t c, T* best, int16_t* which) {
  typedef typename Vector<T>::type V;
  typedef typename TapVector<T>::wide W;
  constexpr int64_t L = Vector<T>::lanes;
  V high[N];
  W tap[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    high[v] = load(from.values[0] + c + v * L);
    tap[v] = W{} + from.tap[0];
  }
  for (int64_t n = 1; n < from.count; ++n) {
    const T* const values = from.values[n] + c;
    const W here = W{} + from.tap[n];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const V x = load(values + v * L);
      const W wins = (x > high[v]) | (x != x);
      high[v] = wins ? x : high[v];
      tap[v] = wins ? here : tap[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    store(best + c + v * L, high[v]);
    const auto taps = __builtin_convertvector(tap[v], typename TapVector<T>::narrow);
    std::memcpy(which + c + v * L, &taps, sizeof(taps));
  }
}

template <typename T>
SPARK_NOINLINE void highest(const Sources<T>& from, int64_t channels, T* best, int16_t* which) {
  constexpr int64_t L = Vector<T>::lanes;
  int64_t c = 0;
  for (; c + kTogether * L <= channels; c += kTogether * L) highest_vectors<T, kTogether>(from, c, best, which);
  for (; c + L <= channels; c += L) highest_vectors<T, 1>(from, c, best, which);
  for (; c < channels; ++c) {
    best[c] = from.values[0][c];
    which[c] = from.tap[0];
    for (int64_t n = 1; n < from.count; ++n) {
      const T x = from.values[n][c];
      if (!(x > best[c] || x != x)) continue;
      best[c] = x;
      which[c] = from.tap[n];
    }
  }
}

// N vectors of the sum of the gradients of those rows that took their maximum here.
template <typename T, int N>
inline void taken_vectors(const Sources<T>& from, int64_t c, T* sum) {
  typedef typename Vector<T>::type V;
  typedef typename TapVector<T>::wide W;
  constexpr int64_t L = Vector<T>::lanes;
  V total[N] = {};
  for (int64_t n = 0; n < from.count; ++n) {
    const W here = W{} + from.tap[n];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      typename TapVector<T>::narrow taps;
      std::memcpy(&taps, from.taken[n] + c + v * L, sizeof(taps));
      total[v] += __builtin_convertvector(taps, W) == here ? load(from.values[n] + c + v * L) : V{};
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) store(sum + c + v * L, total[v]);
}

template <typename T>
SPARK_NOINLINE void taken_gradients(const Sources<T>& from, int64_t channels, T* sum) {
  constexpr int64_t L = Vector<T>::lanes;
  int64_t c = 0;
  for (; c + kTogether * L <= channels; c += kTogether * L) taken_vectors<T, kTogether>(from, c, sum);
  for (; c + L <= channels; c += L) taken_vectors<T, 1>(from, c, sum);
  for (; c < channels; ++c) {
    sum[c] = 0;
    for (int64_t n = 0; n < from.count; ++n) sum[c] += from.taken[n][c] == from.tap[n] ? from.values[n][c] : T(0);
  }
}

// Calls row(place, query row) for each row of the query; the place of a line is found once.
template <typename T, typename Row>
void each_row(const Geometry& g, Row row, [[maybe_unused]] int threads) {
#pragma omp parallel num_threads(threads)
  {
    Sources<T> from(g.taps());
#pragma omp for schedule(static)
    for (int64_t line = 0; line < g.patches * g.query.height; ++line) {
      Place place = place_of(g, line * g.query.width);
      for (int64_t x = 0; x < g.query.width; ++x, ++place.x) {
        from.count = 0;
        row(from, place, line * g.query.width + x);
      }
    }
  }
}

}  // namespace

template <typename T>
void max_pool_forward(const Geometry& g, int64_t channels, const T* source, T* query, int16_t* argmax, int threads) {
  const Neighbours neighbours(g);
  const std::vector<T> zeros(channels);
  const auto row = [&](Sources<T>& from, const Place& place, int64_t q) {
    neighbours.each(place, [&](int64_t row, bool active, int64_t tap) {
      from.values[from.count] = active ? source + row * channels : zeros.data();
      from.tap[from.count++] = static_cast<int16_t>(tap);
    });
    if (from.count) {
      highest(from, channels, query + q * channels, argmax + q * channels);
    } else {  // a window wholly in the padding
      std::fill_n(query + q * channels, channels, -std::numeric_limits<T>::infinity());
      std::fill_n(argmax + q * channels, channels, int16_t(-1));
    }
  };
  each_row<T>(g, row, threads);
}

template <typename T>
void max_pool_grad_input(const Geometry& g, int64_t channels, const T* grad, const int16_t* argmax, T* query,
                         int threads) {
  const Neighbours neighbours(g);
  const auto row = [&](Sources<T>& from, const Place& place, int64_t q) {
    neighbours.each(place, [&](int64_t row, bool active, int64_t tap) {
      from.values[from.count] = grad + row * channels;
      from.taken[from.count] = argmax + row * channels;
      from.tap[from.count] = static_cast<int16_t>(tap);
      from.count += active;
    });
    taken_gradients(from, channels, query + q * channels);
  };
  each_row<T>(g, row, threads);
}

#define SPARK_INSTANTIATE(T)                                                                \
  template void max_pool_forward<T>(const Geometry&, int64_t, const T*, T*, int16_t*, int); \
  template void max_pool_grad_input<T>(const Geometry&, int64_t, const T*, const int16_t*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
