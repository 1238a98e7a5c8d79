// Vectors as the compiler's own type, as wide as the instruction set this file is compiled for. SPARK_ISA names the
// namespace, so that one source gives one set of kernels per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef SPARK_ISA
#define SPARK_ISA portable
#endif

namespace spark {
namespace SPARK_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 12;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6;  // 12 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16, kTileRows = 6;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> integer;
  typedef integer index __attribute__((vector_size(kVectorBytes)));
  static constexpr int lanes = kVectorBytes / sizeof(T);
};

template <typename T>
inline typename Vector<T>::type load(const T* from) {
  typename Vector<T>::type v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* to, const typename Vector<T>::type& v) {
  std::memcpy(to, &v, sizeof(v));
}

}  // namespace SPARK_ISA
}  // namespace spark
