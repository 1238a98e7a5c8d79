// The standard normal distribution, of which the exact GELU is made: x times its distribution function.
#pragma once

#include <cmath>
#include <cstdint>

#include "transpose.h"

namespace spark {
namespace SPARK_ISA {

// The tail beyond y = |x| is exp(-y^2 / 2) R(y), so that one exponential serves distribution and density. R is a
// quotient of polynomials, 5.2e-9 off at most, and 2^f a polynomial, 2.0e-9 off (minimax fits).
inline void normal(const Vec<float>& x, Vec<float>& distribution, Vec<float>& density) {
  typedef Vec<float> V;
  const V zero{}, most = zero + 12.9f;  // beyond, the tail is 0: less than 3e-38
  const V size = x < zero ? -x : x, y = size > most ? most : size;
  // exp(-y^2 / 2) = 2^(n + f), |f| <= 1/2. Adding 1.5 * 2^23 rounds to n, and leaves it in the last bits.
  const V square = y * y, shifted = square * -0.72134752f + 12582912.f;
  const V f = square * -0.72134752f - (shifted - 12582912.f);
  const V p = ((((0.000153532567f * f + 0.00133990039f) * f + 0.00961843861f) * f + 0.0555033216f) * f + 0.240226479f);
  const V power = (p * f + 0.693147203f) * f + 1.f;
  Vector<float>::index bits, n;
  std::memcpy(&bits, &power, sizeof(bits));
  std::memcpy(&n, &shifted, sizeof(n));
  bits += n << 23;
  V exponential;
  std::memcpy(&exponential, &bits, sizeof(bits));
  exponential = size > most ? zero : exponential;
  const V top = (((0.00400988569f * y + 0.0399196347f) * y + 0.18112255f) * y + 0.43544891f) * y + 0.5f;
  const V bottom =
      ((((0.0100511486f * y + 0.100071114f) * y + 0.463891838f) * y + 1.19373717f) * y + 1.6687827f) * y + 1.f;
  const V tail = exponential * (top / bottom);
  distribution = x > zero ? 1.f - tail : tail;
  density = exponential * 0.398942280f;
}

inline void normal(const Vec<double>& x, Vec<double>& distribution, Vec<double>& density) {
  for (int i = 0; i < Vector<double>::lanes; ++i) {
    distribution[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
    density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
  }
}

}  // namespace SPARK_ISA
}  // namespace spark
