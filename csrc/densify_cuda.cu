#include <initializer_list>

#include "cuda_launch.h"

namespace spark {
namespace {

struct alignas(16) Bits128 {
  uint64_t low, high;
};

// Threads of one y share a row (a pixel), so that the divisions below are paid once per row and thread.
template <typename T>
__global__ void gather_patches_kernel(const T* image, Strides strides, const int32_t* coords, int64_t pixels, int side,
                                      int64_t channels, T* rows) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < pixels; row += step) {
    const int64_t patch = row / (side * side);
    const int inside = static_cast<int>(row - patch * side * side);
    const int32_t* at = coords + 3 * patch;
    const int64_t y = static_cast<int64_t>(at[1]) * side + inside / side;
    const int64_t x = static_cast<int64_t>(at[2]) * side + inside % side;
    const T* from = image + at[0] * strides.image + y * strides.y + x * strides.x;
    for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) rows[row * channels + c] = from[c * strides.channel];
  }
}

template <typename T>
__global__ void scatter_patches_kernel(const T* rows, const T* fill, const int32_t* grid_to_patch, int64_t pixels,
                                       int gh, int gw, int side, int64_t channels, T* dense) {
  const int width = gw * side, height = gh * side;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; pixel < pixels; pixel += step) {
    const int64_t line = pixel / width, image = line / height;
    const int x = static_cast<int>(pixel - line * width), y = static_cast<int>(line - image * height);
    const int64_t patch = grid_to_patch[(image * gh + y / side) * gw + x / side];
    const T* from = patch < 0 ? fill : rows + ((patch * side + y % side) * side + x % side) * channels;
    for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) dense[pixel * channels + c] = from ? from[c] : T{};
  }
}

// The widest element, 16 bytes at most, in which these addresses and distances (in bytes) can all be counted.
int64_t common_width(std::initializer_list<uint64_t> bytes) {
  uint64_t bits = 16;
  for (uint64_t b : bytes) bits |= b;
  return static_cast<int64_t>(bits & -bits);
}

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// Calls run(T{}) with an unsigned type of `width` bytes.
template <typename Run>
void with_width(int64_t width, const char* kernel, Run run) {
  switch (width) {
    case 2: return run(uint16_t{});
    case 4: return run(uint32_t{});
    case 8: return run(uint64_t{});
    case 16: return run(Bits128{});
  }
  throw std::invalid_argument(std::string(kernel) + ": elements of " + std::to_string(width) +
                              " bytes; it copies aligned elements of 2, 4 or 8 bytes");
}

}  // namespace

void gather_patches(Queue queue, int64_t element_size, const void* image, Strides strides, const int32_t* coords,
                    int64_t patches, int64_t side, int64_t channels, void* rows) {
  const char* kernel = "gather_patches";
  const int64_t pixels = patches * side * side;
  if (pixels == 0 || channels == 0) return;
  const auto bytes = [=](int64_t elements) { return static_cast<uint64_t>(elements * element_size); };
  int64_t width = element_size;
  if (strides.channel == 1)
    width = common_width(
        {address(image), address(rows), bytes(channels), bytes(strides.image), bytes(strides.y), bytes(strides.x)});
  with_width(width, kernel, [&](auto element) {
    using T = decltype(element);
    const int64_t columns = channels * element_size / width;
    const Strides wide{strides.image * element_size / width, strides.channel, strides.y * element_size / width,
                       strides.x * element_size / width};
    const DeviceGuard guard(queue.device, kernel);
    const RowLaunch shape(pixels, columns);
    SPARK_LAUNCH(gather_patches_kernel<T>, shape.grid, shape.block, 0, stream_of(queue), static_cast<const T*>(image),
                 wide, coords, pixels, static_cast<int>(side), columns, static_cast<T*>(rows));
    check(cudaGetLastError(), kernel);
  });
}

void scatter_patches(Queue queue, int64_t element_size, const void* rows, const void* fill,
                     const int32_t* grid_to_patch, int64_t batch, int64_t gh, int64_t gw, int64_t side,
                     int64_t channels, void* dense) {
  const char* kernel = "scatter_patches";
  const int64_t pixels = batch * gh * gw * side * side;
  if (pixels == 0 || channels == 0) return;
  const int64_t width =
      common_width({address(rows), address(fill), address(dense), static_cast<uint64_t>(channels * element_size)});
  with_width(width, kernel, [&](auto element) {
    using T = decltype(element);
    const int64_t columns = channels * element_size / width;
    const DeviceGuard guard(queue.device, kernel);
    const RowLaunch shape(pixels, columns);
    SPARK_LAUNCH(scatter_patches_kernel<T>, shape.grid, shape.block, 0, stream_of(queue), static_cast<const T*>(rows),
                 static_cast<const T*>(fill), grid_to_patch, pixels, static_cast<int>(gh), static_cast<int>(gw),
                 static_cast<int>(side), columns, static_cast<T*>(dense));
    check(cudaGetLastError(), kernel);
  });
}

}  // namespace spark
