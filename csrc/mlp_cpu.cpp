// The pointwise MLP, linear - GELU - linear. Blocks of rows go all the way through it, so that their hidden rows,
// several times as wide as the others, are still in the cache when they are read.
#include <memory>

#include "gelu.h"
#include "kernels.h"
#include "linear.h"
#include "outer.h"

namespace spark {
namespace SPARK_ISA {
namespace {

constexpr int64_t kThreadRows = 3 * kChunk;  // of a block, for each thread
static_assert(kThreadRows % Product<float>::kBlock == 0);

// The gradient of a weight [width, depth], to which blocks of rows add one after another: one sum in the order of the
// rows, so that the size of the blocks does not matter. Nothing is done for a null weight.
template <typename T>
class BlockGradient {
 public:
  typedef std::unique_ptr<typename WeightGradient<T>::Scratch> Scratch;

  BlockGradient(int64_t rows, int64_t depth, int64_t width, T* weight) {
    if (!weight) return;
    if (rows && depth && width)
      gradient_.reset(new WeightGradient<T>({depth, width, 1}, 1, 1, false, weight));
    else
      std::fill_n(weight, width * depth, T(0));
  }

  Scratch scratch() const { return Scratch(gradient_ ? new typename WeightGradient<T>::Scratch(*gradient_) : nullptr); }
  int64_t items() const { return gradient_ ? gradient_->items() : 0; }
  int64_t units() const { return gradient_ ? gradient_->units() : 0; }

  void run(int64_t item, bool fresh, int64_t rows, const T* grad, const T* x, Scratch& scratch) const {
    gradient_->run(item, fresh, rows, (rows + kChunk - 1) / kChunk, grad, x, RowPairs{rows}, *scratch);
  }

  void finish(int64_t unit) const { gradient_->finish(unit); }

 private:
  std::unique_ptr<WeightGradient<T>> gradient_;
};

}  // namespace

template <typename T>
void mlp_forward(int64_t rows, int64_t channels, int64_t width, int64_t outputs, const T* x, const T* weight1,
                 const T* bias1, const T* weight2, const T* bias2, T* hidden, T* y, int threads) {
  constexpr int64_t L = Vector<T>::lanes;
  const int64_t block = std::min(rows, kThreadRows * threads);
  const std::unique_ptr<T[]> activated(new T[block * width]);
  const auto activate = [=, to = activated.get()](int64_t row, int64_t count, int64_t column, int64_t used, T* values,
                                                  int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < used; c += L) {
        T* const value = values + i * stride + c;
        Vec<T> p = load(value), distribution, density;
        normal(p, distribution, density);
        p *= distribution;
        if (hidden)
          store_part(to + (row + i) * width + column + c, p, used - c);
        else
          store(value, p);
      }
    }
  };
#pragma omp parallel num_threads(threads)
  {
    typename Product<T>::Scratch scratch;
    for (int64_t begin = 0; begin < rows; begin += block) {
      const int64_t count = std::min(block, rows - begin);
      T* const before = hidden ? hidden + begin * width : activated.get();
      const Product<T> first(count, channels, width, x + begin * channels, weight1, false, bias1, before, threads);
      const Product<T> second(count, width, outputs, activated.get(), weight2, false, bias2, y + begin * outputs,
                              threads);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < first.items(); ++item) first.run(item, scratch, activate);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < second.items(); ++item) second.run(item, scratch, nullptr);
    }
  }
}

template <typename T>
void mlp_backward(int64_t rows, int64_t channels, int64_t width, int64_t outputs, const T* dy, const T* x,
                  const T* hidden, const T* weight1, const T* weight2, T* dx, T* dweight1, T* dbias1, T* dweight2,
                  int threads) {
  constexpr int64_t L = Vector<T>::lanes, kBlock = Product<T>::kBlock;
  const int64_t block = std::min(rows, kThreadRows * threads), parts = (rows + kBlock - 1) / kBlock;
  const std::unique_ptr<T[]> before(new T[block * width]), activated(new T[dweight2 ? block * width : 0]);
  const std::unique_ptr<T[]> sums(new T[dbias1 ? parts * width : 0]);
  const BlockGradient<T> first(rows, channels, width, dweight1), second(rows, width, outputs, dweight2);
#pragma omp parallel num_threads(threads)
  {
    typename Product<T>::Scratch scratch;
    auto first_scratch = first.scratch(), second_scratch = second.scratch();
    for (int64_t begin = 0; begin < rows; begin += block) {
      const int64_t count = std::min(block, rows - begin);
      const T *const dy_here = dy + begin * outputs, *const p_here = hidden + begin * width;
      const Product<T> inner(count, outputs, width, dy_here, weight2, true, nullptr, before.get(), threads);
      const Product<T> input(dx ? count : 0, width, channels, before.get(), weight1, true, nullptr,
                             dx ? dx + begin * channels : nullptr, threads);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < inner.items(); ++item)
        inner.run(item, scratch, [&](int64_t row, int64_t n, int64_t column, int64_t used, T* values, int64_t stride) {
          for (int64_t c = 0; c < used; c += L) {
            Vec<T> sum{};
            for (int64_t i = 0; i < n; ++i) {
              T* const value = values + i * stride + c;
              const int64_t at = (row + i) * width + column + c;
              const Vec<T> p = load_part(p_here + at, used - c);
              Vec<T> distribution, density;
              normal(p, distribution, density);
              if (dweight2) store_part(activated.get() + at, Vec<T>(p * distribution), used - c);
              const Vec<T> dp = load(value) * (distribution + p * density);
              store(value, dp);
              sum += dp;
            }
            if (dbias1) store_part(sums.get() + (begin + row) / kBlock * width + column + c, sum, used - c);
          }
        });
      const int64_t weights2 = second.items(), weights = weights2 + first.items();
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < weights + input.items(); ++item) {
        if (item < weights2)
          second.run(item, begin == 0, count, dy_here, activated.get(), second_scratch);
        else if (item < weights)
          first.run(item - weights2, begin == 0, count, before.get(), x + begin * channels, first_scratch);
        else
          input.run(item - weights, scratch, nullptr);
      }
    }
#pragma omp for schedule(static) nowait
    for (int64_t unit = 0; unit < first.units(); ++unit) first.finish(unit);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < second.units(); ++unit) second.finish(unit);
  }
  if (!dbias1) return;
  std::vector<double> total(width);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = 0; c < width; ++c) total[c] += sums[part * width + c];
  for (int64_t c = 0; c < width; ++c) dbias1[c] = static_cast<T>(total[c]);
}

#define SPARK_INSTANTIATE(T)                                                                                          \
  template void mlp_forward<T>(int64_t, int64_t, int64_t, int64_t, const T*, const T*, const T*, const T*, const T*,  \
                               T*, T*, int);                                                                          \
  template void mlp_backward<T>(int64_t, int64_t, int64_t, int64_t, const T*, const T*, const T*, const T*, const T*, \
                                T*, T*, T*, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
