// Tensor cores and asynchronous copies: mma.sync.m16n8k16, ldmatrix and cp.async (sm_80 and later), and on
// csrc/cuda_shim the same in C++, by the fragment layouts of the PTX manual.
//
// A matrix of 8x8 elements of 2 bytes lies in shared memory as 8 rows of 16 bytes, aligned to 16. Lane 8 i + r gives
// the address of row r of matrix i. Lane l then holds of each matrix, as two elements in one register: row l / 4,
// columns 2 (l % 4) and the next; of a transposed one: column l / 4, rows 2 (l % 4) and the next. a [16, 16] is
// matrices of (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15); b [16, 8] is two, transposed: k 0-7 and 8-15.
// A sum [16, 8] is four floats per lane: row l / 4, columns 2 (l % 4) and the next; then row l / 4 + 8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_types.h"

#ifdef SPARK_SHIM
#include <algorithm>
#include <deque>
#include <map>
#include <tuple>
#include <vector>
#endif

namespace spark {

#ifndef SPARK_SHIM

using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// sum += a b
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Begins to copy 16 bytes, or zeros where the source does not exist (it is then not read). They can be read by this
// thread after wait_copies, by others after a barrier as well.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// Makes a group of this thread's copies so far that are in none.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `kPending` latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<SharedAddress>(pointer); }

namespace shim {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// How often rows of one matrix shared banks, so that a GPU would read them one after another.
inline int64_t bank_conflicts = 0;

inline void count_conflicts(const SharedAddress* rows) {
  for (int i = 0; i < 4; ++i) {
    bool taken[8] = {};
    for (int row = 0; row < 8; ++row) {
      bool& bank = taken[rows[8 * i + row] / 16 % 8];
      bank_conflicts += bank;
      bank = true;
    }
  }
}

// Element (row, column) of matrix `i` whose rows' addresses the lanes gave.
inline uint16_t element(const SharedAddress* rows, int i, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const uint16_t*>(rows[8 * i + row]) + column, sizeof(bits));
  return bits;
}

inline void load(uint32_t (&to)[4], SharedAddress row, bool transposed) {
  if (row % 16) row = 0;  // misaligned on a GPU; here the test crashes
  const SharedAddress* rows = spark_shim::exchange(kAllLanes, row);
  const int lane = spark_shim::block().lane(), outer = lane / 4, inner = 2 * (lane % 4);
  if (lane == 0) count_conflicts(rows);
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = transposed ? element(rows, i, inner, outer) : element(rows, i, outer, inner);
    const uint32_t high = transposed ? element(rows, i, inner + 1, outer) : element(rows, i, outer, inner + 1);
    to[i] = low | high << 16;
  }
}

template <typename T>
float half_of(uint32_t bits, int which) {
  const T value{static_cast<uint16_t>(which ? bits >> 16 : bits)};
  return to_float(value);
}

// Copies begin when they are waited for; until then their destination is poison.
class Copies {
 public:
  void add(SharedAddress to, const void* from, bool exists) {
    std::memset(reinterpret_cast<void*>(to), spark_shim::kPoison, 16);
    mine().open.push_back({to, exists ? from : nullptr});
  }

  void commit() {
    Queue& queue = mine();
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
  }

  void wait(size_t pending) {
    Queue& queue = mine();
    for (; queue.groups.size() > pending; queue.groups.pop_front())
      for (const Copy& copy : queue.groups.front()) {
        void* const to = reinterpret_cast<void*>(copy.to);
        if (copy.from)
          std::memcpy(to, copy.from, 16);
        else
          std::memset(to, 0, 16);
      }
  }

 private:
  struct Copy {
    SharedAddress to;
    const void* from;
  };
  struct Queue {
    std::vector<Copy> open;
    std::deque<std::vector<Copy> > groups;
  };

  // This thread's copies; those of earlier blocks are forgotten.
  Queue& mine() {
    const auto block = std::make_tuple(spark_shim::state.launches, blockIdx.x, blockIdx.y, blockIdx.z);
    if (block != block_) threads_.clear();
    block_ = block;
    return threads_[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
  }

  std::tuple<int64_t, unsigned, unsigned, unsigned> block_{-1, 0, 0, 0};
  std::map<unsigned, Queue> threads_;
};

inline Copies& copies() {
  static Copies only;
  return only;
}

}  // namespace shim

inline void load_matrices(uint32_t (&to)[4], SharedAddress row) { shim::load(to, row, false); }
inline void load_transposed(uint32_t (&to)[4], SharedAddress row) { shim::load(to, row, true); }

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments* all = spark_shim::exchange(shim::kAllLanes, Fragments{{a[0], a[1], a[2], a[3]}, {b_low, b_high}});
  const int lane = spark_shim::block().lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, lower = i / 2, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      const float left = shim::half_of<T>(all[4 * row + quad].a[lower + 2 * (k / 8)], k % 2);
      sum[i] += left * shim::half_of<T>(all[4 * column + quad].b[k / 8], k % 2);
    }
  }
}

inline void copy_async(SharedAddress to, const void* from, bool exists) {
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) to = 0;  // misaligned on a GPU; here the test crashes
  shim::copies().add(to, from, exists);
}

inline void commit_copies() { shim::copies().commit(); }

template <int kPending>
void wait_copies() {
  shim::copies().wait(kPending);
}

#endif

}  // namespace spark

#ifdef SPARK_SHIM
extern "C" __attribute__((visibility("default"), used)) inline int64_t* spark_shim_bank_conflicts() {
  return &spark::shim::bank_conflicts;
}
#endif
