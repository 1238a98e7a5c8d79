// y = x times the transposed weight, and its gradients: a matrix product of packed rows. Each item of work packs one
// panel of the weight into its own cache and runs all its rows through it.
#include <algorithm>
#include <vector>

#include "outer.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kLinearDepth = 512;
constexpr int64_t kLinearRows = 1024;  // rows that share a packed panel, where there are enough items all the same

struct IdentityPairs {
  int64_t count;
  const uint16_t* index;
  struct {
    int64_t first;
    int64_t operator()(int64_t p) const { return first + p; }
  } source_of;
};

int64_t rows_per_item(int64_t rows, int64_t panels, int64_t threads) {
  const int64_t wanted = std::max<int64_t>(1, 4 * threads / panels);
  const int64_t share = (rows + wanted - 1) / wanted;
  return std::max<int64_t>(8 * kTileRows, std::min(kLinearRows, share));
}

}  // namespace

template <typename T>
void linear_forward(int64_t rows, int64_t depth, int64_t width, const T* x, const T* weight, bool transposed,
                    const T* bias, T* y, int threads) {
  constexpr int64_t C = panel_width<T>(), L = Vector<T>::lanes;
  if (!rows || !width) return;
  const Panels panels(depth, width, 1, C);
  const int64_t chunk = rows_per_item(rows, panels.total, threads), chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> packed(std::min(depth, kLinearDepth) * C), acc;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < chunks * panels.total; ++item) {
      const int64_t panel = item % panels.total, begin = item / panels.total * chunk;
      const int64_t count = std::min(rows - begin, chunk), used = panels.used(panel), column = panels.first(panel);
      // A whole panel accumulates where its result belongs; a narrower one in a buffer of its own.
      const bool direct = used == C;
      if (!direct) acc.resize(chunk * C);
      T* const out = direct ? y + begin * width + column : acc.data();
      const int64_t ldo = direct ? width : C;
      const BiasRow<T> start(bias, column, used);
      if (!depth)
        for (int64_t i = 0; i < count; ++i) std::copy_n(start.values, C, out + i * ldo);
      for (int64_t k = 0; k < depth; k += kLinearDepth) {
        const int64_t part = std::min(kLinearDepth, depth - k);
        if (transposed) {  // weight (depth, width)
          for (int64_t j = 0; j < part; ++j) {
            const T* from = weight + (k + j) * width + column;
            for (int64_t c = 0; c < C; ++c) packed[j * C + c] = c < used ? from[c] : T(0);
          }
        } else {  // weight (width, depth)
          for (int64_t j = 0; j < part; j += L) {
            for (int64_t c = 0; c < C; c += L) {
              Vec<T> m[L];
              load_columns(weight + (column + c) * depth + k + j, depth, used - c, part - j, weight + width * depth, m);
              for (int64_t i = 0; i < std::min<int64_t>(L, part - j); ++i) store(packed.data() + (j + i) * C + c, m[i]);
            }
          }
        }
        const T* from = x + begin * depth + k;
        multiply<T>(
            count, part, packed.data(), used, k ? nullptr : start.values, [&](int64_t i) { return from + i * depth; },
            [&](int64_t i) { return out + i * ldo; });
      }
      if (!direct)
        for (int64_t i = 0; i < count; ++i) std::copy_n(out + i * C, used, y + (begin + i) * width + column);
    }
  }
}

template <typename T>
void linear_grad_weight(int64_t rows, int64_t depth, int64_t width, const T* x, const T* grad, T* weight,
                        [[maybe_unused]] int threads) {
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  if (!rows || !width || !depth) {  // no pair, no gradient
    std::fill_n(weight, width * depth, T(0));
    return;
  }
  WeightGradient<T> gradient({depth, width, 1}, 1, chunks, true, weight);
#pragma omp parallel num_threads(threads)
  {
    typename WeightGradient<T>::Scratch scratch(gradient);
    const auto pairs = [&](int64_t chunk, int64_t) {
      return IdentityPairs{std::min(kChunk, rows - chunk * kChunk), nullptr, {chunk * kChunk}};
    };
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < gradient.items(); ++item)
      gradient.run(item, 0, rows, chunks, grad, x, pairs, scratch);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < gradient.units(); ++unit) gradient.finish(unit);
  }
}

#define SPARK_INSTANTIATE(T)                                                                               \
  template void linear_forward<T>(int64_t, int64_t, int64_t, const T*, const T*, bool, const T*, T*, int); \
  template void linear_grad_weight<T>(int64_t, int64_t, int64_t, const T*, const T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
