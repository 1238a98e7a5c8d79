// The linear map of rows, and the gradient of its weight.
#include "kernels.h"
#include "linear.h"
#include "outer.h"

namespace spark {
namespace SPARK_ISA {

template <typename T>
void linear_forward(int64_t rows, int64_t depth, int64_t width, const T* x, const T* weight, bool transposed,
                    const T* bias, T* y, int threads) {
  const Product<T> product(rows, depth, width, x, weight, transposed, bias, y, threads);
#pragma omp parallel num_threads(threads)
  {
    typename Product<T>::Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < product.items(); ++item) product.run(item, scratch, nullptr);
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
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < gradient.items(); ++item)
      gradient.run(item, true, rows, chunks, grad, x, RowPairs{rows}, scratch);
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
