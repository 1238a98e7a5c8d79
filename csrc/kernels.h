// The CPU kernels' signatures. T is float or double; `threads` is the caller's (torch's) thread count.
#pragma once

#include <cstdint>

#include "window.h"

namespace spark {

// A window's column part, in pixels; `transposed`: the geometry's query is the window's input.
struct WindowX {
  int64_t stride, padding, dilation;
  bool transposed;
};

// Patches of `side` pixels at coords [patches, 3] (image, grid row, grid column) of two batches of images with the
// strides of (batch, channel, row, column).
struct PatchGrid {
  const int32_t* coords;
  int64_t patches, channels, side;
  int64_t image[4], out[4];
};

enum class Activation { none, relu, relu6, silu };

struct ConvShape {
  int64_t source_channels, query_channels;  // of all groups together
  int64_t groups;
  // Winograd only: each pixel of the geometry stands for a cell of so many pixels on a side, whose channels follow one
  // another in the weight and whose rows lie in a map of that many times the height and width.
  int64_t source_cell = 1, query_cell = 1;

  int64_t depth() const { return source_channels * source_cell * source_cell; }
  int64_t width() const { return query_channels * query_cell * query_cell; }
};

// The rows of each image: those of image i are starts[i] * area up to starts[i + 1] * area.
struct ImageRows {
  const int64_t* starts;  // [images + 1], patches
  int64_t images, area;
};

constexpr int64_t kFewChannels = 8;  // up to here the taps of a row are unfolded into one long row

// The same kernels in one namespace per instruction set; see simd.h.
#define SPARK_KERNELS portable
#include "kernels_isa.h"
#undef SPARK_KERNELS
#ifdef SPARK_HAS_AVX2
#define SPARK_KERNELS avx2
#include "kernels_isa.h"
#undef SPARK_KERNELS
#endif
#ifdef SPARK_HAS_AVX512
#define SPARK_KERNELS avx512
#include "kernels_isa.h"
#undef SPARK_KERNELS
#endif
#ifdef SPARK_ISA  // a kernel's own source sees its own
#define SPARK_KERNELS SPARK_ISA
#include "kernels_isa.h"
#undef SPARK_KERNELS
#endif

}  // namespace spark
