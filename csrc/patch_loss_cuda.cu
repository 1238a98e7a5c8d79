// The loss of masked patches against their normalised pixels, and its gradient, read where they lie in the images.
#include <algorithm>

#include "cuda_launch.h"
#include "cuda_types.h"
#include "window_cuda.h"

namespace spark {
namespace {

constexpr int kThreads = 256, kSumThreads = 512;

// One patch's (or image's) values in three nested dimensions, and how far apart they lie in two tensors.
struct Walk {
  int64_t count;
  Divider inner, middle;  // sizes of the two inner dimensions
  int64_t images[3], prediction[3];

  Walk(const int64_t (&sizes)[3], const int64_t (&image_strides)[3], const int64_t (&prediction_strides)[3])
      : count(sizes[0] * sizes[1] * sizes[2]), inner(sizes[2]), middle(sizes[1]) {
    std::copy(image_strides, image_strides + 3, images);
    std::copy(prediction_strides, prediction_strides + 3, prediction);
  }

  struct Index {
    int outer, middle, inner;
  };

  __device__ __forceinline__ Index index(int i) const {
    const int line = inner.quotient(i), outer = middle.quotient(line);
    return {outer, line - outer * static_cast<int>(middle.divisor), i - line * static_cast<int>(inner.divisor)};
  }

  static __device__ __forceinline__ int64_t offset(const Index& at, const int64_t* strides) {
    return at.outer * strides[0] + at.middle * strides[1] + at.inner * strides[2];
  }
};

// The sum of all threads' values, for all threads, always in the same order.
__device__ float block_sum(float value, float* of_warps) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, bits);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += of_warps[warp];
  return sum;
}

// A block takes one patch after another: mean, then deviation, then error, each a pass over values that stay in cache.
template <typename I, typename P>
__global__ void __launch_bounds__(kThreads, 4)
    patch_errors(const I* images, const P* prediction, const int32_t* coords, int patches, int side, Strides apart,
                 Strides prediction_apart, Walk walk, float eps, float* error, float* mean, float* inverse) {
  SPARK_SHARED(float, of_warps, [kThreads / 32]);
  const int count = static_cast<int>(walk.count);
  for (int patch = blockIdx.x; patch < patches; patch += gridDim.x) {
    const int32_t* at = coords + 3 * static_cast<int64_t>(patch);
    const int64_t y = static_cast<int64_t>(at[1]) * side, x = static_cast<int64_t>(at[2]) * side;
    const I* const pixels = images + at[0] * apart.image + y * apart.y + x * apart.x;
    const P* const predicted =
        prediction + at[0] * prediction_apart.image + y * prediction_apart.y + x * prediction_apart.x;
    float sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads)
      sum += to_float(pixels[Walk::offset(walk.index(i), walk.images)]);
    const float middle = block_sum(sum, of_warps) / count;
    float squares = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const float away = to_float(pixels[Walk::offset(walk.index(i), walk.images)]) - middle;
      squares += away * away;
    }
    const float scale = 1 / sqrtf(block_sum(squares, of_warps) / (count - 1) + eps);
    float errors = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Walk::Index index = walk.index(i);
      const float target = (to_float(pixels[Walk::offset(index, walk.images)]) - middle) * scale;
      const float away = to_float(predicted[Walk::offset(index, walk.prediction)]) - target;
      errors += away * away;
    }
    errors = block_sum(errors, of_warps);
    if (threadIdx.x != 0) continue;
    error[patch] = errors / count;
    mean[patch] = middle;
    inverse[patch] = scale;
  }
}

// One block. Each thread adds every kSumThreads-th value, then pairs of threads add theirs.
__global__ void __launch_bounds__(kSumThreads) mean_of(const float* values, int count, float* mean) {
  SPARK_SHARED(double, sums, [kSumThreads]);
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kSumThreads) sum += values[i];
  sums[threadIdx.x] = sum;
  for (unsigned half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *mean = static_cast<float>(sums[0] / count);
}

// Threads follow the gradient's memory, image by image; visible patches get 0.
template <typename I, typename P>
__global__ void __launch_bounds__(kThreads, 4)
    loss_gradient(const I* images, const P* prediction, Rows masked, int batch, int64_t image_apart,
                  int64_t prediction_apart, Walk walk, bool channels_last, const float* mean, const float* inverse,
                  const float* upstream, float scale, P* gradient) {
  const float factor = *upstream * scale;
  const int step = gridDim.x * kThreads;
  for (int image = blockIdx.y; image < batch; image += gridDim.y) {
    const I* const pixels = images + image * image_apart;
    const P* const predicted = prediction + image * prediction_apart;
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < walk.count; i += step) {
      const Walk::Index at = walk.index(static_cast<int>(i));
      const int y = channels_last ? at.outer : at.middle, x = channels_last ? at.middle : at.inner;
      const int patch =
          masked.grid_to_patch[(image * masked.gh + masked.height.quotient(y)) * masked.gw + masked.width.quotient(x)];
      float value = 0;
      if (patch >= 0) {
        const float target = (to_float(pixels[Walk::offset(at, walk.images)]) - mean[patch]) * inverse[patch];
        value = factor * (to_float(predicted[Walk::offset(at, walk.prediction)]) - target);
      }
      gradient[image * walk.count + i] = from_float<P>(value);
    }
  }
}

// A patch's values, neighbours in memory (of the images) innermost.
Walk patch_walk(const Strides& images, const Strides& prediction, int64_t channels, int64_t side) {
  struct Axis {
    int64_t size, images, prediction;
  } axes[] = {{channels, images.channel, prediction.channel},
              {side, images.y, prediction.y},
              {side, images.x, prediction.x}};
  std::stable_sort(std::begin(axes), std::end(axes), [](const Axis& a, const Axis& b) { return a.images > b.images; });
  return Walk({axes[0].size, axes[1].size, axes[2].size}, {axes[0].images, axes[1].images, axes[2].images},
              {axes[0].prediction, axes[1].prediction, axes[2].prediction});
}

Walk image_walk(const Strides& images, const Strides& prediction, int64_t channels, int64_t height, int64_t width,
                bool channels_last) {
  if (channels_last)
    return Walk({height, width, channels}, {images.y, images.x, images.channel},
                {prediction.y, prediction.x, prediction.channel});
  return Walk({channels, height, width}, {images.channel, images.y, images.x},
              {prediction.channel, prediction.y, prediction.x});
}

void check_values(const PatchMap& masked, int64_t channels, const char* kernel) {
  check_geometry(masked, masked, {1, 1, 1, 1, 0, 0, 1, 1}, kernel);
  const int64_t pixels = masked.gh * masked.height * masked.gw * masked.width;
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - kThreads;
  if (masked.height != masked.width || channels < 1 || pixels > most || pixels * channels > most)
    throw std::invalid_argument(std::string(kernel) +
                                ": an image of no channels, of more than 2^31 values, or of "
                                "patches that are not square");
}

}  // namespace

void patch_loss_forward(Queue queue, FloatType images_type, FloatType prediction_type, const PatchMap& masked,
                        int64_t channels, Strides image_strides, Strides prediction_strides, const void* images,
                        const void* prediction, double eps, float* error, float* mean, float* inverse, float* loss) {
  const char* kernel = "patch_loss_forward";
  check_values(masked, channels, kernel);
  if (masked.patches == 0) throw std::invalid_argument(std::string(kernel) + ": no patch is masked");
  const int patches = static_cast<int>(masked.patches);
  const Walk walk = patch_walk(image_strides, prediction_strides, channels, masked.height);
  with_type(images_type, kernel, [&](auto image_zero) {
    with_type(prediction_type, kernel, [&](auto prediction_zero) {
      using I = decltype(image_zero);
      using P = decltype(prediction_zero);
      const DeviceGuard guard(queue.device, kernel);
      const auto run = patch_errors<I, P>;
      const dim3 grid(static_cast<unsigned>(std::min<int64_t>(patches, SPARK_MAX_BLOCKS)));
      SPARK_LAUNCH(run, grid, dim3(kThreads), 0, stream_of(queue), static_cast<const I*>(images),
                   static_cast<const P*>(prediction), masked.coords, patches, static_cast<int>(masked.height),
                   image_strides, prediction_strides, walk, static_cast<float>(eps), error, mean, inverse);
      check(cudaGetLastError(), kernel);
      SPARK_LAUNCH(mean_of, dim3(1), dim3(kSumThreads), 0, stream_of(queue), error, patches, loss);
      check(cudaGetLastError(), kernel);
    });
  });
}

void patch_loss_grad(Queue queue, FloatType images_type, FloatType prediction_type, const PatchMap& masked,
                     int64_t channels, Strides image_strides, Strides prediction_strides, const void* images,
                     const void* prediction, const float* mean, const float* inverse, const float* upstream,
                     bool channels_last, void* gradient) {
  const char* kernel = "patch_loss_grad";
  check_values(masked, channels, kernel);
  if (masked.batch == 0) return;
  const int64_t height = masked.gh * masked.height, width = masked.gw * masked.width;
  const Walk walk = image_walk(image_strides, prediction_strides, channels, height, width, channels_last);
  const double values = static_cast<double>(masked.rows()) * static_cast<double>(channels);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((walk.count + kThreads - 1) / kThreads, SPARK_MAX_BLOCKS)),
                  static_cast<unsigned>(std::min<int64_t>(masked.batch, std::min(SPARK_MAX_BLOCKS, 65535))));
  with_type(images_type, kernel, [&](auto image_zero) {
    with_type(prediction_type, kernel, [&](auto prediction_zero) {
      using I = decltype(image_zero);
      using P = decltype(prediction_zero);
      const DeviceGuard guard(queue.device, kernel);
      const auto run = loss_gradient<I, P>;
      SPARK_LAUNCH(run, grid, dim3(kThreads), 0, stream_of(queue), static_cast<const I*>(images),
                   static_cast<const P*>(prediction), Rows(masked), static_cast<int>(masked.batch), image_strides.image,
                   prediction_strides.image, walk, channels_last, mean, inverse, upstream,
                   static_cast<float>(2 / values), static_cast<P*>(gradient));
      check(cudaGetLastError(), kernel);
    });
  });
}

}  // namespace spark
