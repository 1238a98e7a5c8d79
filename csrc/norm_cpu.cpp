// Batch norm over rows, with an optional activation.
#include <numeric>
#include <type_traits>

#include "norm.h"
#include "sigmoid.h"

namespace spark {
namespace SPARK_ISA {
namespace {

// Whole rows joined until they fill vectors, so that every number of channels runs in vectors; then cut into parts.
template <typename T>
struct Parts {
  int64_t channels, width, elements, rows, count;  // width: channels of a joined row; rows: joined rows of a part

  Parts(int64_t all, int64_t channels) : channels(channels), elements(all * channels) {
    constexpr int64_t L = Vector<T>::lanes;
    const int64_t step = std::max(L, std::lcm(channels, L));  // channels of the fewest rows that fill vectors
    width = (kJoinVectors * L + step - 1) / step * step;
    const int64_t joined = (elements + width - 1) / width;
    rows = std::max(kLeastRows, (joined + kParts - 1) / kParts);
    count = (joined + rows - 1) / rows;
  }

  int64_t begin(int64_t part) const { return part * rows * width; }
  int64_t end(int64_t part) const { return std::min(elements, begin(part + 1)); }

  // A value of each channel as one of each element of a joined row.
  template <typename From>
  std::vector<T> joined(From value_of) const {
    std::vector<T> values(width);
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(value_of(c));
    for (int64_t c = channels; c < width; ++c) values[c] = values[c - channels];
    return values;
  }
};

// sums[0, c] and sums[1, c] = sums over the rows of the two values that terms(V{}, element, c, first, second) gives.
template <typename T, typename Terms>
std::vector<double> sum_rows(const Parts<T>& parts, Terms terms, int threads) {
  const int64_t channels = parts.channels, width = parts.width;
  std::vector<double> sums(std::max<int64_t>(1, parts.count) * 2 * channels);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> first(width), second(width);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts.count; ++part) {
      double* const to = sums.data() + part * 2 * channels;
      for (int64_t begin = parts.begin(part), end; begin < parts.end(part); begin = end) {
        end = std::min(parts.end(part), begin + kFold * width);
        std::fill(first.begin(), first.end(), T(0));
        std::fill(second.begin(), second.end(), T(0));
        add_rows(begin, end, width, terms, first.data(), second.data());
        for (int64_t c = 0; c < width; c += channels) {
          for (int64_t k = 0; k < channels; ++k) to[k] += first[c + k];
          for (int64_t k = 0; k < channels; ++k) to[channels + k] += second[c + k];
        }
      }
    }
  }
  add_parts(parts.count, 2 * channels, sums);
  return sums;
}

// out[element] = value_of(V{}, element, c), the last rows first: those are the ones that a sum has left in the cache.
template <typename T, typename Value>
void write_all(const Parts<T>& parts, Value value_of, T* out, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t left = parts.count; left > 0; --left)
    write_rows(parts.begin(left - 1), parts.end(left - 1), parts.width, value_of, out);
}

// NaN passes through all, as it does in PyTorch.
template <Activation A, typename V>
inline V activate(V y) {
  if constexpr (A == Activation::relu) y = y < V{} ? V{} : y;
  if constexpr (A == Activation::relu6) {
    const V six = V{} + 6;
    y = y < V{} ? V{} : y;
    y = y > six ? six : y;
  }
  if constexpr (A == Activation::silu) y = y * sigmoid(y);
  return y;
}

template <Activation A, typename V>
inline V activation_gradient(V y, V dy) {
  if constexpr (A == Activation::relu) dy = y <= V{} ? V{} : dy;
  if constexpr (A == Activation::relu6) {
    const V six = V{} + 6;
    dy = y <= V{} ? V{} : dy;
    dy = y >= six ? V{} : dy;
  }
  if constexpr (A == Activation::silu) {
    const V s = sigmoid(y);
    dy = dy * (s + y * s * (1 - s));
  }
  return dy;
}

// Calls call(constant of the activation).
template <typename Call>
void with_activation(Activation activation, Call call) {
  if (activation == Activation::relu)
    call(std::integral_constant<Activation, Activation::relu>{});
  else if (activation == Activation::relu6)
    call(std::integral_constant<Activation, Activation::relu6>{});
  else if (activation == Activation::silu)
    call(std::integral_constant<Activation, Activation::silu>{});
  else
    call(std::integral_constant<Activation, Activation::none>{});
}

// The normalisation as scale * x + shift; forward and backward must agree on it to the last bit.
template <typename T>
struct Affine {
  std::vector<T> scale, shift;

  Affine(const Parts<T>& parts, const T* weight, const T* bias, const T* mean, const T* rstd)
      : scale(parts.joined([=](int64_t c) { return (weight ? weight[c] : T(1)) * (rstd ? rstd[c] : T(1)); })),
        shift(
            parts.joined([&](int64_t c) { return (bias ? bias[c] : 0.) - (mean ? double(mean[c]) * scale[c] : 0.); })) {
  }

  // What goes into the activation at an element; `residual` as with_residual gives it.
  template <typename Residual>
  auto before_activation(const T* x, Residual residual) const {
    return [=, scale = scale.data(), shift = shift.data()](auto tag, int64_t i, int64_t c) {
      typedef decltype(tag) V;
      const V y = get<V>(x + i) * get<V>(scale + c) + get<V>(shift + c);
      if constexpr (std::is_pointer_v<Residual>) return V(y + get<V>(residual + i));
      return y;
    };
  }
};

// Calls call(residual), or call(nullptr) of a type that is no pointer, where there is none.
template <typename T, typename Call>
void with_residual(const T* residual, Call call) {
  if (residual)
    call(residual);
  else
    call(nullptr);
}

}  // namespace

// Mean and variance of the batch, and the running ones brought up to date.
template <typename T>
void batch_statistics(int64_t rows, int64_t channels, const T* x, double momentum, double eps, T* running_mean,
                      T* running_var, T* mean, T* rstd, int threads) {
  const Parts<T> parts(rows, channels);
  const int64_t sampled = std::min(rows, kPivotRows);
  std::vector<double> sampled_sum(channels);
  for (int64_t i = 0; i < sampled; ++i) {
    const T* const row = x + rows * i / sampled * channels;
    for (int64_t c = 0; c < channels; ++c) sampled_sum[c] += row[c];
  }
  const std::vector<T> around = parts.joined([&](int64_t c) { return sampled_sum[c] / sampled; });
  const T* const pivot = around.data();
  const std::vector<double> sums = sum_rows(
      parts,
      [=](auto tag, int64_t i, int64_t c, auto& first, auto& second) {
        typedef decltype(tag) V;
        first = get<V>(x + i) - get<V>(pivot + c);
        second = first * first;
      },
      threads);
  for (int64_t c = 0; c < channels; ++c) {
    const double off = sums[c] / rows, center = pivot[c] + off;
    const double squares = sums[channels + c] - sums[c] * off, spread = squares < 0 ? 0 : squares;
    mean[c] = static_cast<T>(center);
    rstd[c] = static_cast<T>(1 / std::sqrt(spread / rows + eps));
    if (running_mean) running_mean[c] = static_cast<T>(momentum * center + (1 - momentum) * running_mean[c]);
    if (running_var) running_var[c] = static_cast<T>(momentum * spread / (rows - 1) + (1 - momentum) * running_var[c]);
  }
}

template <typename T>
void batch_apply(int64_t rows, int64_t channels, const T* x, const T* residual, const T* mean, const T* rstd,
                 const T* weight, const T* bias, Activation activation, T* y, int threads) {
  const Parts<T> parts(rows, channels);
  const Affine<T> affine(parts, weight, bias, mean, rstd);
  with_activation(activation, [&](auto constant) {
    with_residual(residual, [&](auto added) {
      const auto before = affine.before_activation(x, added);
      write_all(
          parts, [=](auto tag, int64_t i, int64_t c) { return activate<decltype(constant)::value>(before(tag, i, c)); },
          y, threads);
    });
  });
}

template <typename T>
void batch_norm_backward(int64_t rows, int64_t channels, const T* dy, const T* x, const T* residual, const T* weight,
                         const T* bias, const T* mean, const T* rstd, bool training, Activation activation, T* dx,
                         T* dresidual, T* dweight, T* dbias, int threads) {
  const Parts<T> parts(rows, channels);
  const Affine<T> affine(parts, weight, bias, mean, rstd);
  const std::vector<T> centers = parts.joined([=](int64_t c) { return mean ? mean[c] : T(0); });
  const T *scale = affine.scale.data(), *center = centers.data();
  with_activation(activation, [&](auto constant) {
    with_residual(residual, [&](auto added) {
      const auto before = affine.before_activation(x, added);
      const auto gradient = [=](auto tag, int64_t i, int64_t c) {
        typedef decltype(tag) V;
        if constexpr (decltype(constant)::value == Activation::none) return get<V>(dy + i);
        return activation_gradient<decltype(constant)::value>(before(tag, i, c), get<V>(dy + i));
      };
      const std::vector<double> sums = sum_rows(
          parts,
          [=](auto tag, int64_t i, int64_t c, auto& first, auto& second) {
            typedef decltype(tag) V;
            first = gradient(tag, i, c);
            if constexpr (std::is_pointer_v<decltype(added)>) put(dresidual + i, V(first));
            second = first * (get<V>(x + i) - get<V>(center + c));
          },
          threads);
      for (int64_t c = 0; c < channels; ++c) {
        dbias[c] = static_cast<T>(sums[c]);
        dweight[c] = static_cast<T>(sums[channels + c] * (rstd ? rstd[c] : T(1)));
      }
      if (!dx) return;
      const auto of_norm = [=](auto tag, int64_t i, int64_t c) {
        typedef decltype(tag) V;
        return V(std::is_pointer_v<decltype(added)> ? get<V>(dresidual + i) : gradient(tag, i, c));
      };
      if (!training) {  // constant statistics: the rows, which may be infinite, do not matter
        write_all(
            parts,
            [=](auto tag, int64_t i, int64_t c) {
              typedef decltype(tag) V;
              return V(of_norm(tag, i, c) * get<V>(scale + c));
            },
            dx, threads);
        return;
      }
      // dx = scale * (dy - mean of dy - xhat * mean of dy * xhat)
      const std::vector<T> slopes =
          parts.joined([&](int64_t c) { return -sums[channels + c] / rows * rstd[c] * rstd[c] * scale[c]; });
      const std::vector<T> offsets = parts.joined([&](int64_t c) { return -sums[c] / rows * scale[c]; });
      const T *slope = slopes.data(), *offset = offsets.data();
      write_all(
          parts,
          [=](auto tag, int64_t i, int64_t c) {
            typedef decltype(tag) V;
            const V away = get<V>(x + i) - get<V>(center + c), g = of_norm(tag, i, c);
            return V(g * get<V>(scale + c) + (away * get<V>(slope + c) + get<V>(offset + c)));
          },
          dx, threads);
    });
  });
}

#define SPARK_INSTANTIATE(T)                                                                                         \
  template void batch_statistics<T>(int64_t, int64_t, const T*, double, double, T*, T*, T*, T*, int);                \
  template void batch_apply<T>(int64_t, int64_t, const T*, const T*, const T*, const T*, const T*, const T*,         \
                               Activation, T*, int);                                                                 \
  template void batch_norm_backward<T>(int64_t, int64_t, const T*, const T*, const T*, const T*, const T*, const T*, \
                                       const T*, bool, Activation, T*, T*, T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
