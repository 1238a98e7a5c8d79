// Register-blocked matrix products: up to kTileRows rows times one or two vectors of columns, the sums in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "transpose.h"

namespace spark {
namespace SPARK_ISA {

// Inlined, the loops' accumulators compete for registers with what surrounds them, and spill.
#define SPARK_NOINLINE __attribute__((noinline))

constexpr int64_t kDepth = 128;  // source channels whose part of a panel stays in the cache

template <typename T>
constexpr int64_t panel_width() {
  return 2 * Vector<T>::lanes;
}

// The columns of a matrix in panels: depth source channels, width query channels, for each group.
struct Panels {
  int64_t depth, width, per_group, total, columns;

  Panels(int64_t depth, int64_t width, int64_t groups, int64_t columns)
      : depth(depth), width(width), per_group((width + columns - 1) / columns), total(per_group * groups),
        columns(columns) {}

  int64_t group(int64_t panel) const { return panel / per_group; }
  int64_t first(int64_t panel) const { return panel % per_group * columns; }  // first column, inside the group
  int64_t used(int64_t panel) const { return std::min(columns, width - first(panel)); }
};

// acc[m] = (first or, if null, acc[m]) + a[m][0..depth) times b (depth x panel), for M rows and N vectors of the panel.
template <typename T, int M, int N>
SPARK_NOINLINE void tile(const T* const* a, int64_t depth, const T* b, const T* first, T* const* acc) {
  typedef typename Vector<T>::type V;
  constexpr int L = Vector<T>::lanes;
  V sum[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = load((first ? first : acc[m]) + n * L);
  for (int64_t k = 0; k < depth; ++k, b += panel_width<T>()) {
    V right[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) right[n] = load(b + n * L);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const T value = a[m][k];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[m][n] += value * right[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(acc[m] + n * L, sum[m][n]);
}

template <typename T, int N, int M = kTileRows>
inline void tile_of(int64_t rows, const T* const* a, int64_t depth, const T* b, const T* first, T* const* acc) {
  if constexpr (M > 0) {
    if (rows == M)
      tile<T, M, N>(a, depth, b, first, acc);
    else
      tile_of<T, N, M - 1>(rows, a, depth, b, first, acc);
  }
}

// The same for `rows` rows, given by the functions a_of(i) and acc_of(i), and the `used` columns of a panel.
template <typename T, typename A, typename Acc>
inline void multiply(int64_t rows, int64_t depth, const T* b, int64_t used, const T* first, A a_of, Acc acc_of) {
  const T* a[kTileRows];
  T* acc[kTileRows];
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t m = std::min<int64_t>(kTileRows, rows - i);
    for (int64_t j = 0; j < m; ++j) {
      a[j] = a_of(i + j);
      acc[j] = acc_of(i + j);
    }
    if (used <= Vector<T>::lanes)
      tile_of<T, 1>(m, a, depth, b, first, acc);
    else
      tile_of<T, 2>(m, a, depth, b, first, acc);
  }
}

// A panel's part of the bias, 0 where there is none.
template <typename T>
struct BiasRow {
  T values[panel_width<T>()] = {};

  BiasRow(const T* bias, int64_t column, int64_t used) {
    if (bias) std::copy_n(bias + column, used, values);
  }
};

}  // namespace SPARK_ISA
}  // namespace spark
