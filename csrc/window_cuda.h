// Which source row a query row reads at a tap, by arithmetic and one look-up in the grid of patches. The meaning is
// that of spark_fast/ops/window.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels_cuda.h"

namespace spark {

constexpr int kMasked = -1;   // inside the image, not active
constexpr int kOutside = -2;  // beyond the border

// Division of 0 <= n < 2^31 by a number that is known at the launch: a product and a shift.
struct Divider {
  uint32_t divisor, magic, shift;

  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }

  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(n), magic) + static_cast<uint32_t>(n)) >> shift);
  }
};

// PatchMap for a kernel: all numbers fit 31 bits, so that only offsets of values need 64.
struct Rows {
  const int32_t *coords, *grid_to_patch;
  int patches, gh, gw;
  Divider height, width, area;  // of a patch

  explicit Rows(const PatchMap& map)
      : coords(map.coords), grid_to_patch(map.grid_to_patch), patches(static_cast<int>(map.patches)),
        gh(static_cast<int>(map.gh)), gw(static_cast<int>(map.gw)), height(map.height), width(map.width),
        area(map.height * map.width) {}

  // The row of pixel (y, x) of an image, or kMasked, or kOutside.
  __device__ __forceinline__ int at(int image, int y, int x) const {
    if (y < 0 || x < 0 || y >= gh * static_cast<int>(height.divisor) || x >= gw * static_cast<int>(width.divisor))
      return kOutside;
    const int row = height.quotient(y), column = width.quotient(x);
    const int patch = grid_to_patch[(image * gh + row) * gw + column];
    if (patch < 0) return kMasked;
    const int h = static_cast<int>(height.divisor), w = static_cast<int>(width.divisor);
    return (patch * h + y - row * h) * w + x - column * w;
  }
};

struct Place {
  int image, y, x;
};

__device__ __forceinline__ Place place_of(const Rows& rows, int row) {
  const int patch = rows.area.quotient(row), inside = row - patch * static_cast<int>(rows.area.divisor);
  const int y = rows.width.quotient(inside), x = inside - y * static_cast<int>(rows.width.divisor);
  const int32_t* c = rows.coords + 3 * static_cast<int64_t>(patch);
  return {c[0], c[1] * static_cast<int>(rows.height.divisor) + y, c[2] * static_cast<int>(rows.width.divisor) + x};
}

// One axis of a window. Forward it leads from an output coordinate to the input's, transposed back.
struct Taps {
  int count, padding, dilation;
  Divider stride;
  bool transposed;

  Taps(int64_t count, int64_t stride, int64_t padding, int64_t dilation, bool transposed)
      : count(static_cast<int>(count)), padding(static_cast<int>(padding)), dilation(static_cast<int>(dilation)),
        stride(stride), transposed(transposed) {}

  // The source coordinate of query coordinate q at tap k; negative, or beyond the image, where there is none.
  __device__ __forceinline__ int source(int q, int k) const {
    if (!transposed) return q * static_cast<int>(stride.divisor) - padding + k * dilation;
    const int scaled = q + padding - k * dilation;
    if (scaled < 0) return -1;
    const int source = stride.quotient(scaled);
    return source * static_cast<int>(stride.divisor) == scaled ? source : -1;
  }
};

struct Taps2d {
  Taps y, x;

  Taps2d(const Window& w, bool transposed)
      : y(w.kernel_y, w.stride_y, w.padding_y, w.dilation_y, transposed),
        x(w.kernel_x, w.stride_x, w.padding_x, w.dilation_x, transposed) {}
};

// Throws std::invalid_argument where a number of the geometry does not fit 31 bits, or makes no sense.
inline void check_geometry(const PatchMap& source, const PatchMap& query, const Window& w, const char* kernel) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const auto fits = [](int64_t least, std::initializer_list<int64_t> factors) {
    int64_t product = 1;
    for (int64_t factor : factors) {
      if (factor < least || factor > most || product * factor > most) return false;
      product *= factor;
    }
    return true;
  };
  bool good = fits(1, {w.kernel_y, w.kernel_x}) && fits(1, {w.stride_y, w.stride_x}) &&
              fits(0, {w.padding_y, w.padding_x}) && fits(1, {w.dilation_y, w.dilation_x}) &&
              source.batch == query.batch;
  for (const PatchMap* map : {&source, &query}) {
    good &= fits(1, {map->height, map->width}) && fits(0, {map->patches, map->height, map->width}) &&
            fits(0, {map->batch, map->gh, map->gw});
    // Coordinates that a window reaches from the map.
    const int64_t tall = map->gh * map->height * w.stride_y + w.padding_y + w.kernel_y * w.dilation_y;
    const int64_t wide = map->gw * map->width * w.stride_x + w.padding_x + w.kernel_x * w.dilation_x;
    good &= tall <= most && wide <= most;
  }
  if (!good)
    throw std::invalid_argument(std::string(kernel) + ": a number of the geometry is negative or does not fit 31 bits");
}

}  // namespace spark
