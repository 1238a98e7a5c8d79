// Enough of CUDA's runtime to build a .cu file as C++ and run its kernels on the CPU, thread after thread.
// For kernels whose threads are independent: there is no __syncthreads, no shared memory and no warp operation, so a
// kernel that needs one does not compile here. Tests build it (tests/native/); no shipped module does.
#pragma once

#include <cstdint>
#include <type_traits>

#define __global__
#define SPARK_LAUNCH(kernel, grid, block, stream, ...) spark_shim::launch(kernel, grid, block, stream, __VA_ARGS__)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };

namespace spark_shim {

// What tests read and set; the layout is repeated in tests/native/shim.py.
struct State {
  int64_t device;         // the current device, of two
  int64_t fail_next;      // the error of the next launch, then 0
  int64_t launches;       // how many so far
  int64_t launch_device;  // of the last launch
  int64_t stream;
  int64_t element_size;  // of the first argument, an array
  int64_t blocks, threads_x, threads_y;
};
inline State state{};

template <typename First, typename... Rest, typename... Args>
void launch(void (*kernel)(const First*, Rest...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
  ++state.launches;
  state.launch_device = state.device;
  state.stream = reinterpret_cast<int64_t>(stream);
  state.element_size = sizeof(First);
  state.blocks = grid.x;
  state.threads_x = block.x;
  state.threads_y = block.y;
  const bool legal = grid.x && grid.y == 1 && grid.z == 1 && block.z == 1 && block.x * block.y - 1 < 1024;
  if (!legal) state.fail_next = cudaErrorInvalidConfiguration;
  if (state.fail_next) return;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
      for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(args...);
}

}  // namespace spark_shim

extern "C" __attribute__((visibility("default"), used)) inline void* spark_shim_state() { return &spark_shim::state; }

inline cudaError_t cudaGetLastError() {
  const auto error = static_cast<cudaError_t>(spark_shim::state.fail_next);
  spark_shim::state.fail_next = 0;
  return error;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = static_cast<int>(spark_shim::state.device);
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  spark_shim::state.device = device;
  return cudaSuccess;
}

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorInvalidConfiguration";
}

inline const char* cudaGetErrorString(cudaError_t) { return "set by the shim"; }
