"""csrc/mma.h on the CPU: fragments lie as the PTX manual says, and copies come when they are waited for, not before."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_shim import ORDERS, Shim, build, state_of
from torch import Tensor

SOURCE = r"""
#include "cuda_launch.h"
#include "mma.h"

using namespace spark;

// to [32, 4]: the registers of each lane for the four matrices whose 32 rows are `from`.
template <bool kTransposed>
__global__ void fragments(const uint16_t* from, uint32_t* to) {
  SPARK_SHARED(uint4, rows, [32]);
  const int lane = threadIdx.x;
  rows[lane] = *reinterpret_cast<const uint4*>(from + 8 * lane);
  __syncwarp();
  uint32_t got[4];
  (kTransposed ? load_transposed : load_matrices)(got, shared_address(&rows[lane]));
  for (int i = 0; i < 4; ++i) to[4 * lane + i] = got[i];
}

// to [16, 8] += a [16, 16] b [16, 8], in memory row by row; b's second half of columns belongs to another product
template <typename T>
__global__ void product(const T* a, const T* b, float* to) {
  SPARK_SHARED(uint4, left, [32]);
  SPARK_SHARED(uint4, right, [32]);
  const int lane = threadIdx.x, matrix = lane / 8, line = lane % 8;
  left[lane] = *reinterpret_cast<const uint4*>(a + 8 * lane);
  right[lane] = *reinterpret_cast<const uint4*>(b + 8 * lane);
  __syncwarp();
  uint32_t x[4], y[4];
  load_matrices(x, shared_address(&left[2 * (line + 8 * (matrix % 2)) + matrix / 2]));
  load_transposed(y, shared_address(&right[2 * (line + 8 * (matrix % 2)) + matrix / 2]));
  for (int half = 0; half < 2; ++half) {
    float sum[4] = {1, 1, 1, 1};
    multiply_add<T>(sum, x, y[2 * half], y[2 * half + 1]);
    for (int i = 0; i < 4; ++i) to[16 * (lane / 4 + 8 * (i / 2)) + 8 * half + 2 * (lane % 4) + i % 2] = sum[i];
  }
}

// Three groups of 16 bytes per thread, of which the last may be under way; the second of them has no source.
template <int kPending>
__global__ void copies(const float* from, float* to) {
  SPARK_SHARED(float4, line, [3 * 32]);
  for (int group = 0; group < 3; ++group) {
    copy_async(shared_address(&line[32 * group + threadIdx.x]), from + 4 * (32 * group + threadIdx.x), group != 1);
    commit_copies();
  }
  wait_copies<kPending>();
  __syncthreads();
  for (int group = 0; group < 3; ++group)
    reinterpret_cast<float4*>(to)[32 * group + threadIdx.x] = line[32 * group + (threadIdx.x + 1) % 32];
}

// to[i] = from[63 - i] through shared memory, between operations that only the lanes of a warp wait for
template <bool kBarrier>
__global__ void across_warps(const float* from, float* to) {
  SPARK_SHARED(float, line, [64]);
  line[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, from[threadIdx.x ^ 1], 1);
  if (kBarrier) __syncthreads();
  __syncwarp();
  to[threadIdx.x] = line[63 - threadIdx.x];
}

template <typename T>
int multiply(const T* a, const T* b, float* to) {
  SPARK_LAUNCH(product<T>, dim3(1), dim3(32), 0, nullptr, a, b, to);
  return cudaGetLastError();
}

#define EXPORT extern "C" __attribute__((visibility("default"))) int
EXPORT plain(const uint16_t* from, uint32_t* to) {
  SPARK_LAUNCH(fragments<false>, dim3(1), dim3(32), 0, nullptr, from, to);
  return cudaGetLastError();
}
EXPORT transposed(const uint16_t* from, uint32_t* to) {
  SPARK_LAUNCH(fragments<true>, dim3(1), dim3(32), 0, nullptr, from, to);
  return cudaGetLastError();
}
EXPORT product_float16(const __half* a, const __half* b, float* to) { return multiply(a, b, to); }
EXPORT product_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* to) { return multiply(a, b, to); }
EXPORT across_warps_right(const float* from, float* to) {
  SPARK_LAUNCH(across_warps<true>, dim3(1), dim3(64), 0, nullptr, from, to);
  return cudaGetLastError();
}
EXPORT across_warps_wrong(const float* from, float* to) {
  SPARK_LAUNCH(across_warps<false>, dim3(1), dim3(64), 0, nullptr, from, to);
  return cudaGetLastError();
}
EXPORT copies_0(const float* from, float* to) {
  SPARK_LAUNCH(copies<0>, dim3(1), dim3(32), 0, nullptr, from, to);
  return cudaGetLastError();
}
EXPORT copies_1(const float* from, float* to) {
  SPARK_LAUNCH(copies<1>, dim3(1), dim3(32), 0, nullptr, from, to);
  return cudaGetLastError();
}
EXPORT copies_3(const float* from, float* to) {
  SPARK_LAUNCH(copies<3>, dim3(1), dim3(32), 0, nullptr, from, to);
  return cudaGetLastError();
}
"""


@pytest.fixture(scope="module")
def mma(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    folder = tmp_path_factory.mktemp("mma")
    (folder / "mma.cu").write_text(SOURCE)
    library = build(folder / "mma.so", folder / "mma.cu")
    return Shim(library, state_of(library))


def run(mma: Shim, name: str, *tensors: Tensor, order: int = 0) -> None:
    with mma.order(order):
        error = getattr(mma.module, name)(*(ctypes.c_void_p(t.data_ptr()) for t in tensors))
    assert error == 0, mma.state.problem.decode()


@pytest.mark.parametrize("order", ORDERS)
def test_fragments(mma: Shim, order: int) -> None:
    matrices = torch.randperm(4 * 64).view(4, 8, 8)
    lanes = torch.arange(32)
    row, column = lanes // 4, 2 * (lanes % 4)
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    run(mma, "plain", matrices.to(torch.int16), out, order=order)
    assert torch.equal(
        out.long(), torch.stack((matrices[:, row, column], matrices[:, row, column + 1])).permute(2, 1, 0)
    )
    run(mma, "transposed", matrices.to(torch.int16), out, order=order)
    assert torch.equal(
        out.long(), torch.stack((matrices[:, column, row], matrices[:, column + 1, row])).permute(2, 1, 0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product(mma: Shim, dtype: torch.dtype) -> None:
    a, b = torch.randint(-9, 10, (16, 16)).to(dtype), torch.randint(-9, 10, (16, 16)).to(dtype)
    out = torch.empty(16, 16)
    run(mma, f"product_{str(dtype).removeprefix('torch.')}", a, b, out)
    assert torch.equal(out, 1 + a.float() @ b.float())  # integers below 2^24: exact in any order


@pytest.mark.parametrize("order", ORDERS)
def test_copies_come_in_groups_when_waited_for(mma: Shim, order: int) -> None:
    values, out = torch.randn(3, 32, 4), torch.empty(3, 32, 4)
    expected = values.roll(-1, 1)
    expected[1] = 0
    run(mma, "copies_0", values, out, order=order)
    assert torch.equal(out, expected)
    run(mma, "copies_1", values, out, order=order)
    assert torch.equal(out[:2], expected[:2]) and out[2].isnan().all()
    run(mma, "copies_3", values, out, order=order)
    assert out.isnan().all()


def test_a_warp_waits_for_another_at_a_barrier_only(mma: Shim) -> None:
    values, out = torch.randn(64), torch.empty(64)
    for order in ORDERS:
        run(mma, "across_warps_right", values, out, order=order)
        assert torch.equal(out, values.flip(0))
    for order in (0, 1):  # a shuffle may happen to be right
        run(mma, "across_warps_wrong", values, out, order=order)
        assert out.isnan().any()
