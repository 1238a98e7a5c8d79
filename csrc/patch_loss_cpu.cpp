// The loss of masked patches against their normalised pixels, and its gradient, without copies of the patches.
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace spark {
namespace SPARK_ISA {
namespace {

// Calls body(offset in images, offset in prediction) for each value of a patch.
template <typename Body>
inline void for_patch(const PatchGrid& g, const int32_t* place, Body body) {
  const int64_t y = place[1] * g.side, x = place[2] * g.side;
  for (int64_t c = 0; c < g.channels; ++c) {
    const int64_t image = place[0] * g.image[0] + c * g.image[1] + y * g.image[2] + x * g.image[3];
    const int64_t out = place[0] * g.out[0] + c * g.out[1] + y * g.out[2] + x * g.out[3];
    for (int64_t i = 0; i < g.side; ++i)
      for (int64_t j = 0; j < g.side; ++j)
        body(image + i * g.image[2] + j * g.image[3], out + i * g.out[2] + j * g.out[3]);
  }
}

}  // namespace

template <typename T>
void patch_loss_forward(const PatchGrid& g, const T* images, const T* prediction, double eps, double* error, T* mean,
                        T* root, [[maybe_unused]] int threads) {
  const double count = static_cast<double>(g.channels * g.side * g.side);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < g.patches; ++p) {
    const int32_t* const place = g.coords + 3 * p;
    double sum = 0, squares = 0, errors = 0;
    for_patch(g, place, [&](int64_t image, int64_t) { sum += images[image]; });
    const double middle = sum / count;
    for_patch(g, place, [&](int64_t image, int64_t) {
      const double away = images[image] - middle;
      squares += away * away;
    });
    const double deviation = std::sqrt(squares / (count - 1) + eps);
    for_patch(g, place, [&](int64_t image, int64_t out) {
      const double away = prediction[out] - (images[image] - middle) / deviation;
      errors += away * away;
    });
    error[p] = errors / count;
    mean[p] = static_cast<T>(middle);
    root[p] = static_cast<T>(deviation);
  }
}

template <typename T>
void patch_loss_grad(const PatchGrid& g, const T* images, const T* prediction, const T* mean, const T* root,
                     double scale, T* grad, [[maybe_unused]] int threads) {
  const T factor = static_cast<T>(scale);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < g.patches; ++p) {
    const T middle = mean[p], inverse = 1 / root[p];
    for_patch(g, g.coords + 3 * p, [&](int64_t image, int64_t out) {
      grad[out] = factor * (prediction[out] - (images[image] - middle) * inverse);
    });
  }
}

#define SPARK_INSTANTIATE(T)                                                                               \
  template void patch_loss_forward<T>(const PatchGrid&, const T*, const T*, double, double*, T*, T*, int); \
  template void patch_loss_grad<T>(const PatchGrid&, const T*, const T*, const T*, const T*, double, T*, int);
SPARK_INSTANTIATE(float)
SPARK_INSTANTIATE(double)

}  // namespace SPARK_ISA
}  // namespace spark
