// float32, float16 and bfloat16 in memory, float32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels_cuda.h"

namespace spark {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two neighbouring values, loaded and stored as one word.
template <typename T>
struct Pair;

template <>
struct Pair<float> {
  typedef float2 Word;
  static __device__ __forceinline__ float2 unpack(Word word) { return word; }
  static __device__ __forceinline__ Word pack(float2 value) { return value; }
};

template <>
struct Pair<__half> {
  typedef uint32_t Word;
  static __device__ __forceinline__ float2 unpack(Word word) {
    __half2 both;
    memcpy(&both, &word, sizeof(word));
    return __half22float2(both);
  }
  static __device__ __forceinline__ Word pack(float2 value) {
    const __half2 both = __floats2half2_rn(value.x, value.y);
    Word word;
    memcpy(&word, &both, sizeof(word));
    return word;
  }
};

template <>
struct Pair<__nv_bfloat16> {
  typedef uint32_t Word;
  static __device__ __forceinline__ float2 unpack(Word word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
  }
  static __device__ __forceinline__ Word pack(float2 value) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(value.x, value.y);
    Word word;
    memcpy(&word, &both, sizeof(word));
    return word;
  }
};

__device__ __forceinline__ void add_product(float2& sum, float2 a, float2 b) {
  sum.x = fmaf(a.x, b.x, sum.x);
  sum.y = fmaf(a.y, b.y, sum.y);
}

// The first `valid` (0, 1 or 2) of two neighbouring values, 0 for the others. `paired`: they can be read as one word.
template <typename T>
__device__ __forceinline__ float2 load_two(const T* from, int valid, bool paired) {
  if (valid == 2 && paired) return Pair<T>::unpack(*reinterpret_cast<const typename Pair<T>::Word*>(from));
  return make_float2(valid > 0 ? to_float(from[0]) : 0.0f, valid > 1 ? to_float(from[1]) : 0.0f);
}

template <typename T>
__device__ __forceinline__ void store_two(T* to, float2 value, int valid, bool paired) {
  if (valid == 2 && paired) {
    *reinterpret_cast<typename Pair<T>::Word*>(to) = Pair<T>::pack(value);
    return;
  }
  if (valid > 0) to[0] = from_float<T>(value.x);
  if (valid > 1) to[1] = from_float<T>(value.y);
}

// Calls run(T{}) with the type that `type` names.
template <typename Run>
void with_type(FloatType type, const char* kernel, Run run) {
  switch (type) {
    case FloatType::kFloat32: return run(float{});
    case FloatType::kFloat16: return run(__half{});
    case FloatType::kBFloat16: return run(__nv_bfloat16{});
  }
  throw std::invalid_argument(std::string(kernel) + ": type " + std::to_string(static_cast<int>(type)) +
                              "; it takes 0 (float32), 1 (float16) and 2 (bfloat16)");
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace spark
