// What every kernel launch needs: the caller's device, a launch, shared memory, and an error that names the kernel.
// csrc/cuda_shim/cuda_runtime.h stands in for CUDA's own header when a .cu file is built for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels_cuda.h"

#ifndef SPARK_SHIM
// SPARK_LAUNCH(kernel, grid, block, bytes of dynamic shared memory, stream, arguments...)
#define SPARK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// Inside a kernel: SPARK_SHARED(float, tile, [8][33]) declares an array, SPARK_DYNAMIC_SHARED(float, tile) the pointer
// to what the launch asked for, aligned to 16 bytes.
#define SPARK_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define SPARK_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char spark_dynamic[]; \
  type* const name = reinterpret_cast<type*>(spark_dynamic)
#endif
#ifndef SPARK_MAX_BLOCKS
#define SPARK_MAX_BLOCKS 65535  // kernels stride over the rest
#endif

namespace spark {

inline cudaStream_t stream_of(const Queue& queue) { return reinterpret_cast<cudaStream_t>(queue.stream); }

inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch, a good one, would find this error
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel) : wanted_(device) {
    check(cudaGetDevice(&previous_), kernel);
    if (previous_ != wanted_) check(cudaSetDevice(wanted_), kernel);
  }
  ~DeviceGuard() {
    if (previous_ != wanted_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int wanted_, previous_ = 0;
};

// Lets `kernel` be launched with `bytes` of dynamic shared memory on the current device; beyond 48 KB that must be
// said.
template <typename Kernel>
void allow_shared(Kernel* kernel, int64_t bytes, const char* name) {
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

// Blocks of threads (x: columns of a row, y: rows) for `rows` rows of `columns` elements.
struct RowLaunch {
  dim3 grid, block;

  RowLaunch(int64_t rows, int64_t columns) {
    constexpr unsigned kThreads = 256;
    unsigned x = 1;
    while (x < kThreads && x < columns) x *= 2;
    block = dim3(x, kThreads / x);
    grid = dim3(static_cast<unsigned>(std::min<int64_t>((rows + block.y - 1) / block.y, SPARK_MAX_BLOCKS)));
  }
};

}  // namespace spark
