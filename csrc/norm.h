// What batch and layer norm share. Sums are kept in the working type over kFold rows at most and in double beyond; the
// parts are cut by the rows alone and added in order, so that the result does not depend on the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace spark {
namespace SPARK_ISA {

constexpr int64_t kParts = 64;      // pieces of the rows, each summed by one thread
constexpr int64_t kLeastRows = 32;  // in a piece
constexpr int64_t kFold = 128;      // rows summed in the working type

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

// sums[0] += sums[1] + sums[2] + ..., each `size` long, in this order.
inline void add_parts(int64_t parts, int64_t size, std::vector<double>& sums) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[part * size + k];
}

}  // namespace SPARK_ISA
}  // namespace spark
