// Enough of CUDA's runtime to build a .cu file as C++ and run its kernels on the CPU, in the order that a test chooses:
// blocks one after another, a block's threads as fibers (block.h). Tests build it (tests/native/), no shipped module.
//
// A kernel declares shared memory through SPARK_SHARED and SPARK_DYNAMIC_SHARED and is launched through SPARK_LAUNCH
// (csrc/cuda_launch.h has their meaning for a GPU); __shared__ itself does not compile here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <type_traits>

#include "block.h"

#define SPARK_SHIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define SPARK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  spark_shim::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define SPARK_SHARED(type, name, ...)            \
  static const char spark_shared_##name = 0;     \
  using spark_type_##name = type __VA_ARGS__;    \
  auto& name = *static_cast<spark_type_##name*>( \
      spark_shim::block().shared.array(&spark_shared_##name, sizeof(spark_type_##name)))
#define SPARK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(spark_shim::block().shared.dynamic())

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

namespace spark_shim {

// What tests read and set; the layout is repeated in tests/cuda_shim.py.
struct State {
  int64_t device;         // the current device, of two
  int64_t fail_next;      // the error of the next launch, then 0
  int64_t launches;       // how many so far
  int64_t launch_device;  // of the last launch
  int64_t stream;
  int64_t element_size;  // of the first argument, where that is an array
  int64_t blocks, threads_x, threads_y;
  int64_t order;         // of blocks, and of threads between barriers: 0 forward, 1 backward, else a shuffle's seed
  int64_t shared_bytes;  // of the last launch's blocks, dynamic and static
  int64_t barriers;      // arrivals at __syncthreads in the last launch
  char problem[200];     // what went wrong inside the last kernel
  int64_t shared_at_most = 227 * 1024;  // what a block may ask for
};
constexpr size_t kSharedByDefault = 48 * 1024;
inline State state{};

inline std::map<const void*, size_t>& shared_allowed() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

template <typename T>
constexpr int64_t element_size_of() {
  if constexpr (std::is_pointer_v<T> && !std::is_void_v<std::remove_pointer_t<T>>)
    return sizeof(std::remove_pointer_t<T>);
  else
    return 0;
}

// As on a GPU, the next cudaGetLastError finds it too.
inline cudaError_t fail(cudaError_t error, const std::string& problem) {
  std::snprintf(state.problem, sizeof(state.problem), "%s", problem.c_str());
  state.fail_next = error;
  return error;
}

template <typename First, typename... Rest, typename... Args>
void launch(void (*kernel)(First, Rest...), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
            Args... args) {
  ++state.launches;
  state.launch_device = state.device;
  state.stream = reinterpret_cast<int64_t>(stream);
  state.element_size = element_size_of<First>();
  state.blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  state.threads_x = threads.x;
  state.threads_y = threads.y;
  state.barriers = 0;
  if (state.fail_next) {
    std::snprintf(state.problem, sizeof(state.problem), "set by the test");
    return;
  }
  const auto known = shared_allowed().find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = known == shared_allowed().end() ? kSharedByDefault : known->second;
  const bool legal = grid.x && grid.x < 1u << 31 && grid.y && grid.y < 1u << 16 && grid.z && grid.z < 1u << 16 &&
                     threads.x && threads.x <= 1024 && threads.y && threads.y <= 1024 && threads.z && threads.z <= 64 &&
                     threads.x * threads.y * threads.z <= 1024;
  if (!legal || shared_bytes > allowed) {
    fail(cudaErrorInvalidConfiguration, legal ? "more shared memory than allowed" : "sizes of the grid or the block");
    return;
  }
  gridDim = grid;
  blockDim = threads;
  const std::function<void()> body = [&] { kernel(args...); };
  Block& runner = block();
  for (uint32_t place : ordered(static_cast<uint32_t>(state.blocks), state.order)) {
    blockIdx = dim3(place % grid.x, place / grid.x % grid.y, place / (grid.x * grid.y));
    runner.barriers = 0;
    std::string problem = runner.run(body, shared_bytes, state.order);
    state.barriers += runner.barriers;
    state.shared_bytes = static_cast<int64_t>(runner.shared.total());
    if (problem.empty() && runner.shared.total() - shared_bytes > kSharedByDefault)
      problem = "more than 48 KB of static shared memory";
    if (!problem.empty()) {
      fail(cudaErrorLaunchFailure, problem);
      return;
    }
  }
}

// What every lane of `mask` gave, by lane, once all of them are here. Lanes outside the mask are poison. The values
// stay valid until the thread's next warp operation. All warp operations, and those of csrc/mma.h, are made of this.
template <typename T>
const T* exchange(unsigned mask, const T& mine) {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16);
  return reinterpret_cast<const T*>(block().exchange(mask, &mine, sizeof(T)));
}

}  // namespace spark_shim

extern "C" __attribute__((visibility("default"), used)) inline void* spark_shim_state() { return &spark_shim::state; }

inline void __syncthreads(int line = __builtin_LINE()) { spark_shim::block().barrier(line); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { spark_shim::exchange(mask, char{}); }

// Lane `from` of the caller's segment of `width` lanes; the caller's own value where that is outside the segment.
template <typename T>
T spark_shim_lane(unsigned mask, T value, int from, int width) {
  const T* values = spark_shim::exchange(mask, value);
  const int lane = spark_shim::block().lane(), first = lane - lane % width;
  return values[from < first || from >= first + width ? lane : from];
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = spark_shim::block().lane();
  return spark_shim_lane(mask, value, lane - lane % width + (from & (width - 1)), width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return spark_shim_lane(mask, value, spark_shim::block().lane() ^ bits, width);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return spark_shim_lane(mask, value, spark_shim::block().lane() + static_cast<int>(by), width);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return spark_shim_lane(mask, value, spark_shim::block().lane() - static_cast<int>(by), width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int* all = spark_shim::exchange(mask, predicate);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && all[lane]) bits |= 1u << lane;
  return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T>
T __ldg(const T* from) {
  return *from;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

using std::max;
using std::min;

#define SPARK_VECTOR(name, type, bytes)                                         \
  struct alignas(bytes) name##2 { type x, y; };                                 \
  struct alignas(2 * bytes > 16 ? 16 : 2 * bytes) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SPARK_VECTOR(float, float, 8)
SPARK_VECTOR(int, int, 8)
SPARK_VECTOR(uint, unsigned, 8)
SPARK_VECTOR(short, short, 4)
SPARK_VECTOR(ushort, unsigned short, 4)
#undef SPARK_VECTOR

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
  if (device < 0 || device > 1) return spark_shim::fail(cudaErrorInvalidDevice, "no such device");
  spark_shim::state.device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : static_cast<int>(spark_shim::state.shared_at_most);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > spark_shim::state.shared_at_most)
    return spark_shim::fail(cudaErrorInvalidValue, "more shared memory than there is");
  spark_shim::shared_allowed()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return static_cast<cudaError_t>(spark_shim::state.fail_next);
}

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unknown";
}

inline const char* cudaGetErrorString(cudaError_t) { return spark_shim::state.problem; }
