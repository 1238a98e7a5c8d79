// float16 for csrc/cuda_shim: storage, and conversions that round to nearest, ties to even.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7FFF;
  float result;
  if (rest < 0x0400) {  // below the normal numbers
    result = std::ldexp(static_cast<float>(rest), -24);
    return sign ? -result : result;
  }
  const uint32_t bits = sign | (rest >= 0x7C00 ? 0x7F800000 | (rest & 0x03FF) << 13 : (rest << 13) + 0x38000000);
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (value != value) return {0x7FFF};
  uint32_t half = 0x7C00;
  if (rest < 0x38800000)  // below the normal numbers of float16
    half = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
  else if (rest < 0x477FF000)  // less than what rounds to infinity
    half = (rest + 0x0FFF + (rest >> 13 & 1) - 0x38000000) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
