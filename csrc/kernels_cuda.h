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

}  // namespace spark
