// What batch, layer and group norm share. Sums are kept in the working type over kFold rows at most and in double
// beyond; the parts are cut by the rows alone and added in order, so that the result does not depend on the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace spark {
namespace SPARK_ISA {

constexpr int64_t kParts = 64;       // pieces of the rows, each summed by one thread
constexpr int64_t kLeastRows = 32;   // in a piece
constexpr int64_t kFold = 128;       // rows summed in the working type
constexpr int64_t kPivotRows = 8;    // rows whose mean the variance is summed around
constexpr int64_t kJoinVectors = 4;  // vectors in a joined row, at least
constexpr int64_t kGroup = 4;        // joined rows that are handled together

template <typename V, typename T>
inline V get(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V, typename T>
inline void put(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(v));
}

// Calls body(V{}, c) for each vector of `count` channels, then body(T{}, c) for each of the rest.
template <typename T, typename Body>
inline void sweep(int64_t count, Body body) {
  typedef typename Vector<T>::type V;
  constexpr int64_t L = Vector<T>::lanes;
  int64_t c = 0;
  for (; c + L <= count; c += L) body(V{}, c);
  for (; c < count; ++c) body(T{}, c);
}

// first and second += the terms of `N` rows from `row` on. The rows share what is loaded for a channel.
template <typename T, int N, typename Terms>
inline void add_group(int64_t row, int64_t width, int64_t count, Terms terms, T* first, T* second) {
  sweep<T>(count, [=](auto tag, int64_t c) {
    typedef decltype(tag) V;
    V a = get<V>(first + c), b = get<V>(second + c);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      V p, q;
      terms(tag, row + n * width + c, c, p, q);
      a += p;
      b += q;
    }
    put(first + c, a);
    put(second + c, b);
  });
}

template <typename T, typename Terms>
SPARK_NOINLINE void add_rows(int64_t row, int64_t end, int64_t width, Terms terms, T* first, T* second) {
  for (; row + kGroup * width <= end; row += kGroup * width)
    add_group<T, kGroup>(row, width, width, terms, first, second);
  for (; row < end; row += width) add_group<T, 1>(row, width, std::min(width, end - row), terms, first, second);
}

template <typename T, int N, typename Value>
inline void write_group(int64_t row, int64_t width, int64_t count, Value value_of, T* out) {
  sweep<T>(count, [=](auto tag, int64_t c) {
    decltype(tag) values[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) values[n] = value_of(tag, row + n * width + c, c);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) put(out + row + n * width + c, values[n]);
  });
}

template <typename T, typename Value>
SPARK_NOINLINE void write_rows(int64_t row, int64_t end, int64_t width, Value value_of, T* out) {
  for (; row + kGroup * width <= end; row += kGroup * width) write_group<T, kGroup>(row, width, width, value_of, out);
  for (; row < end; row += width) write_group<T, 1>(row, width, std::min(width, end - row), value_of, out);
}

// sums[0] += sums[1] + sums[2] + ..., each `size` long, in this order.
inline void add_parts(int64_t parts, int64_t size, std::vector<double>& sums) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[part * size + k];
}

}  // namespace SPARK_ISA
}  // namespace spark
