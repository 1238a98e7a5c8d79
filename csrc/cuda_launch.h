// What every kernel launch needs: the caller's device, a launch, and an error that names the kernel.
// csrc/cuda_shim/cuda_runtime.h stands in for CUDA's own header when a .cu file is built for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels_cuda.h"

#ifndef SPARK_LAUNCH
#define SPARK_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
#ifndef SPARK_MAX_BLOCKS
#define SPARK_MAX_BLOCKS 65535  // kernels stride over the rest
#endif

namespace spark {

inline cudaStream_t stream_of(const Queue& queue) { return reinterpret_cast<cudaStream_t>(queue.stream); }

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
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
