// Between the order of a weight in memory, where the taps of a channel lie together, and that of the kernels, where the
// channels of a tap do: transposes of square blocks of vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace spark {
namespace SPARK_ISA {

template <typename T>
using Vec = typename Vector<T>::type;

// A vector of the first `count` values, the rest 0.
template <typename T>
inline Vec<T> load_part(const T* from, int64_t count) {
  if (count >= Vector<T>::lanes) return load(from);
  T values[Vector<T>::lanes] = {};
  std::copy_n(from, std::max<int64_t>(count, 0), values);
  return load(values);
}

template <typename T>
inline void store_part(T* to, const Vec<T>& v, int64_t count) {
  if (count >= Vector<T>::lanes) return store(to, v);
  T values[Vector<T>::lanes];
  store(values, v);
  std::copy_n(values, std::max<int64_t>(count, 0), to);
}

// As many rounds of interleaving each vector with the one half a block further as halve the block to one.
template <typename T>
inline void transpose_block(Vec<T> (&m)[Vector<T>::lanes]) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::index Index;
  Index low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + i % 2 * L;
    high[i] = L / 2 + i / 2 + i % 2 * L;
  }
  for (int round = 1; round < L; round *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(m[i], m[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(m[i], m[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) m[i] = next[i];
  }
}

// m[t][c] = from[c * stride + t] for t < count and c < used, else 0 or anything; nothing is read at `end` or beyond.
template <typename T>
inline void load_columns(const T* from, int64_t stride, int64_t used, int64_t count, const T* end,
                         Vec<T> (&m)[Vector<T>::lanes]) {
  constexpr int L = Vector<T>::lanes;
  for (int c = 0; c < L; ++c) {
    const T* const column = from + c * stride;
    m[c] = c >= used ? Vec<T>{} : column + L <= end ? load(column) : load_part(column, count);
  }
  transpose_block<T>(m);
}

// to[c * stride + t] = m[t][c] for t < count and c < used.
template <typename T>
inline void store_columns(Vec<T> (&m)[Vector<T>::lanes], int64_t stride, int64_t used, int64_t count, T* to) {
  constexpr int64_t L = Vector<T>::lanes;
  transpose_block<T>(m);
  for (int64_t c = 0; c < std::min(used, L); ++c) {
    // What a whole vector writes too much, the next columns write again.
    const bool whole = stride == count && (used - c) * stride >= L;
    store_part(to + c * stride, m[c], whole ? L : count);
  }
}

}  // namespace SPARK_ISA
}  // namespace spark
