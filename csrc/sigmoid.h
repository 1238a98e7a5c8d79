// The logistic function 1 / (1 + exp(-x)) of vectors and numbers.
#pragma once

#include <cmath>

#include "transpose.h"

namespace spark {
namespace SPARK_ISA {

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline Vec<float> sigmoid(const Vec<float>& x) {
  typedef Vec<float> V;
  const V least = V{} - 87.f, most = V{} + 88.f;  // beyond, the exponential leaves float's normal range
  V y = -x;
  y = y < least ? least : y;
  y = y > most ? most : y;
  // exp(y) = 2^n exp(r), |r| <= ln(2) / 2, ln(2) in two parts of which n times the first is exact. Adding 1.5 * 2^23
  // rounds to n, and leaves it in the last bits. Taylor's series to r^7 is 6e-9 off.
  const V shifted = y * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const V r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  V power = r * (1.f / 5040) + 1.f / 720;
  power = power * r + 1.f / 120;
  power = power * r + 1.f / 24;
  power = power * r + 1.f / 6;
  power = power * r + 0.5f;
  power = (power * r + 1.f) * r + 1.f;
  Vector<float>::index bits, exponent;
  std::memcpy(&bits, &power, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;
  V exponential;
  std::memcpy(&exponential, &bits, sizeof(bits));
  const V result = 1.f / (1.f + exponential);
  return x == x ? (x < -most ? V{} : result) : x;  // 0 below: x times the least sigmoid would grow with x
}

inline Vec<double> sigmoid(const Vec<double>& x) {
  Vec<double> y;
  for (int i = 0; i < Vector<double>::lanes; ++i) y[i] = sigmoid(double(x[i]));
  return y;
}

}  // namespace SPARK_ISA
}  // namespace spark
