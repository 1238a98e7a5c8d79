// The CUDA kernels' launchers. This header needs no CUDA. Arguments are validated in spark_fast/ops/*/cuda.py.
#pragma once

#include <cstdint>

namespace spark {

// Where a kernel runs; `stream` is a cudaStream_t of that device.
struct Queue {
  int device;
  uintptr_t stream;
};

struct Strides {
  int64_t image, channel, y, x;  // in elements
};

// Throws std::runtime_error where the module has no machine code for the device, or the driver is too old for it.
void check_device(int device);

// densify: packed rows <-> dense maps. Bit copies: an element is 2, 4 or 8 bytes of any type.
// rows [patches * side * side, channels]: patch by patch, row-major inside a patch.

// rows <- the active patches of `image`, a map of any strides. coords [patches, 3]: image, grid row, grid column.
void gather_patches(Queue queue, int64_t element_size, const void* image, Strides strides, const int32_t* coords,
                    int64_t patches, int64_t side, int64_t channels, void* rows);

// dense [batch, gh * side, gw * side, channels] <- rows; masked pixels get fill [channels], or 0 where fill is null.
// grid_to_patch [batch, gh, gw]: the patch's number, negative where masked. Each element is written once.
void scatter_patches(Queue queue, int64_t element_size, const void* rows, const void* fill,
                     const int32_t* grid_to_patch, int64_t batch, int64_t gh, int64_t gw, int64_t side,
                     int64_t channels, void* dense);

enum class FloatType { kFloat32, kFloat16, kBFloat16 };

// The rows of a batch of maps [batch, gh * height, gw * width]: active patches of height x width pixels, patch by
// patch, row-major inside a patch.
struct PatchMap {
  const int32_t* coords;  // [patches, 3]: image, grid row, grid column
  int64_t patches;
  const int32_t* grid_to_patch;  // [batch, gh, gw]: the patch's number, negative where masked
  int64_t batch, gh, gw, height, width;

  int64_t rows() const { return patches * height * width; }
};

struct Window {
  int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  int64_t taps() const { return kernel_y * kernel_x; }
};

// Depthwise convolution. Values are of `type`, sums float32; weight [channels, taps].

// query [rows, channels] <- bias (or 0) + for each tap, source row * weight. Transposed: the input's gradient, where
// the query is the input and the source the output's gradient.
void depthwise_gather(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                      const Window& window, bool transposed, int64_t channels, const void* source, const void* weight,
                      const void* bias, void* query);

// The number of parts that depthwise_grad_weight sums by itself.
int64_t depthwise_parts(FloatType type, const PatchMap& source_map, const PatchMap& query_map, const Window& window,
                        int64_t channels);

// weight [channels, taps] <- sum over query rows of source row * query row. sums [parts, taps, channels] is scratch.
void depthwise_grad_weight(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                           const Window& window, int64_t channels, const void* source, const void* query, float* sums,
                           int64_t parts, void* weight);

// Max pooling.

// query [rows, channels] <- the highest value of each window, and argmax <- its tap, -1 for a window wholly outside.
void max_pool_forward(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                      const Window& window, int64_t channels, const void* source, void* query, int16_t* argmax);

// query: the input's rows <- the sum of those source rows, the output's gradient, whose maximum each of them was.
void max_pool_grad_input(Queue queue, FloatType type, const PatchMap& source_map, const PatchMap& query_map,
                         const Window& window, int64_t channels, const void* source, const int16_t* argmax,
                         void* query);

// Patch loss. `masked`: the patches that it covers, `channels` values a pixel; images and prediction of any strides.

// loss <- the mean over patches of error [patches], the mean squared difference of the prediction and the normalised
// pixels (x - mean) * inverse, where inverse is 1 / sqrt(unbiased variance + eps). At least one patch.
void patch_loss_forward(Queue queue, FloatType images_type, FloatType prediction_type, const PatchMap& masked,
                        int64_t channels, Strides image_strides, Strides prediction_strides, const void* images,
                        const void* prediction, double eps, float* error, float* mean, float* inverse, float* loss);

// gradient <- upstream * the loss's gradient of the prediction, 0 at visible patches. The gradient is dense: [batch, y,
// x, channel] (channels_last) or [batch, channel, y, x]. upstream: one value on the device.
void patch_loss_grad(Queue queue, FloatType images_type, FloatType prediction_type, const PatchMap& masked,
                     int64_t channels, Strides image_strides, Strides prediction_strides, const void* images,
                     const void* prediction, const float* mean, const float* inverse, const float* upstream,
                     bool channels_last, void* gradient);

// 3x3 convolution of stride 1 and padding 1 on rows of patches of side 2, 4, 8 or 16, in float16 or bfloat16 with
// float32 sums. Numbers of channels are multiples of 8, addresses of 16 bytes.

// out [rows, columns] <- source [rows, channels] by weight [9, channels, columns], plus bias [columns] where not null.
// `turned`: taps in reverse order, for the gradient of the input.
void conv_gather(Queue queue, FloatType type, const PatchMap& map, int64_t channels, int64_t columns, bool turned,
                 const void* source, const void* weight, const void* bias, void* out);

// The number of parts that conv_weight sums by itself, as suits the device.
int64_t conv_weight_parts(int device, const PatchMap& map, int64_t channels, int64_t columns);

// out [columns, channels, 9] <- the gradient of the weight, for source [rows, channels] and grad [rows, columns], of
// one row or more. partial [parts, 9, channels, columns] is scratch.
void conv_weight(Queue queue, FloatType type, const PatchMap& map, int64_t channels, int64_t columns,
                 const void* source, const void* grad, float* partial, int64_t parts, void* out);

}  // namespace spark
