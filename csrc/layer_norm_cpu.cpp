// Layer norm over the channels of each row.
#include "norm.h"

namespace spark {
namespace SPARK_ISA {
namespace {

// The halves of a vector added until one value is left.
template <typename T, int Bytes>
inline T sum_lanes(const T (&lanes)[Bytes / sizeof(T)]) {
  if constexpr (Bytes == sizeof(T)) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(Bytes / 2)));
    Half low, high;
    std::memcpy(&low, lanes, sizeof(low));
    std::memcpy(&high, lanes + Bytes / 2 / sizeof(T), sizeof(high));
    T rest[Bytes / 2 / sizeof(T)];
    low += high;
    std::memcpy(rest, &low, sizeof(low));
    return sum_lanes<T, Bytes / 2>(rest);
  }
}

template <typename T>
inline T sum_lanes(const typename Vector<T>::type& v) {
  T lanes[Vector<T>::lanes];
  store(lanes, v);
  return sum_lanes<T, kVectorBytes>(lanes);
}

// first and second = sums over a row's channels of the two values that terms(V{}, c, first, second) gives.
template <typename T, typename Terms>
inline void sum_row(int64_t channels, Terms terms, T& first, T& second) {
  typedef typename Vector<T>::type V;
  constexpr int64_t L = Vector<T>::lanes;
  V a[2] = {}, b[2] = {};
  T rest[2] = {};
  int64_t c = 0;
  for (; c + 2 * L <= channels; c += 2 * L)
    for (int64_t k = 0; k < 2; ++k) {
      V p, q;
      terms(V{}, c + k * L, p, q);
      a[k] += p;
      b[k] += q;
    }
  for (; c + L <= channels; c += L) {
    V p, q;
    terms(V{}, c, p, q);
    a[0] += p;
    b[0] += q;
  }
  for (; c < channels; ++c) {
    T p, q;
    terms(T{}, c, p, q);
    rest[0] += p;
    rest[1] += q;
  }
  first = sum_lanes<T>(a[0] + a[1]) + rest[0];
  second = sum_lanes<T>(b[0] + b[1]) + rest[1];
}

// Without a weight it is 1; `body` then need not look.
template <typename T>
inline const T* or_ones(const T* weight, int64_t channels, std::vector<T>& ones) {
  if (!weight) ones.assign(channels, T(1));
  return weight ? weight : ones.data();
}

template <typename T>
SPARK_NOINLINE void layer_norm_row(int64_t channels, const T* x, const T* weight, const T* bias, double eps, T* y,
                                   T& mean, T& rstd) {
  T first, second;
  sum_row<T>(
      channels,
      [=](auto tag, int64_t c, auto& p, auto& q) {
        p = get<decltype(tag)>(x + c);
        q = tag;
      },
      first, second);
  const T center = first / channels;
  sum_row<T>(
      channels,
      [=](auto tag, int64_t c, auto& p, auto& q) {
        p = get<decltype(tag)>(x + c) - center;
        q = p * p;
      },
      first, second);
  const double off = double(first) / channels, spread = double(second) / channels - off * off;
  mean = static_cast<T>(center + off);
  rstd = static_cast<T>(1 / std::sqrt((spread < 0 ? 0 : spread) + eps));
  const T shift = mean, scale = rstd;
  sweep<T>(channels, [=](auto tag, int64_t c) {
    typedef decltype(tag) V;
    const V out = (get<V>(x + c) - shift) * scale * get<V>(weight + c);
    put(y + c, bias ? V(out + get<V>(bias + c)) : out);
  });
}

// Writes dx (unless null) and adds to the sums of the gradients of weight and bias.
template <typename T>
SPARK_NOINLINE void layer_norm_row_backward(int64_t channels, const T* dy, const T* x, const T* weight, T mean, T rstd,
                                            T* dx, T* dweight, T* dbias) {
  T sum, along;
  sum_row<T>(
      channels,
      [=](auto tag, int64_t c, auto& p, auto& q) {
        typedef decltype(tag) V;
        p = get<V>(dy + c) * get<V>(weight + c);
        q = p * ((get<V>(x + c) - mean) * rstd);
      },
      sum, along);
  const T offset = sum / channels, slope = along / channels;
  sweep<T>(channels, [=](auto tag, int64_t c) {
    typedef decltype(tag) V;
    const V gradient = get<V>(dy + c), normal = (get<V>(x + c) - mean) * rstd;
    put(dweight + c, V(get<V>(dweight + c) + gradient * normal));
    put(dbias + c, V(get<V>(dbias + c) + gradient));
    if (dx) put(dx + c, V((gradient * get<V>(weight + c) - offset - normal * slope) * rstd));
  });
}

}  // namespace

template <typename T>
void layer_norm_forward(int64_t rows, int64_t channels, const T* x, const T* weight, const T* bias, double eps, T* y,
                        T* mean, T* rstd, [[maybe_unused]] int threads) {
  std::vector<T> ones;
  const T* const factor = or_ones(weight, channels, ones);
#pragma omp parallel for schedule(dynamic, kLeastRows) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    layer_norm_row(channels, x + row * channels, factor, bias, eps, y + row * channels, mean[row], rstd[row]);
}

template <typename T>
void layer_norm_backward(int64_t rows, int64_t channels, const T* dy, const T* x, const T* weight, const T* mean,
                         const T* rstd, T* dx, T* dweight, T* dbias, [[maybe_unused]] int threads) {
  std::vector<T> ones;
  const T* const factor = or_ones(weight, channels, ones);
  const int64_t share = std::max(kLeastRows, (rows + kParts - 1) / kParts), parts = (rows + share - 1) / share;
  std::vector<double> sums(std::max<int64_t>(1, parts) * 2 * channels);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> part_sums(2 * channels);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) {
      double* const to = sums.data() + part * 2 * channels;
      for (int64_t row = part * share, end; row < std::min(rows, (part + 1) * share); row = end) {
        end = std::min({rows, (part + 1) * share, row + kFold});
        std::fill(part_sums.begin(), part_sums.end(), T(0));
        for (int64_t r = row; r < end; ++r)
          layer_norm_row_backward(channels, dy + r * channels, x + r * channels, factor, mean[r], rstd[r],
                                  dx ? dx + r * channels : nullptr, part_sums.data(), part_sums.data() + channels);
        for (int64_t k = 0; k < 2 * channels; ++k) to[k] += part_sums[k];
      }
    }
  }
  add_parts(parts, 2 * channels, sums);
  std::copy_n(sums.begin(), channels, dweight);
  std::copy_n(sums.begin() + channels, channels, dbias);
}

#define SPARK_INSTANTIATE(T)                                                                                           \
  template void layer_norm_forward<T>(int64_t, int64_t, const T*, const T*, const T*, double, T*, T*, T*, int);        \
  template void layer_norm_backward<T>(int64_t, int64_t, const T*, const T*, const T*, const T*, const T*, T*, T*, T*, \
                                       int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
