"""csrc/cuda_shim itself: what a GPU would get wrong at random must show on the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_shim import ORDERS, Shim, build, state_of

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_launch.h"

// to[i] = from[n - 1 - i] through shared memory; without the barrier a thread may read what nobody wrote yet.
template <bool kBarrier>
__global__ void reverse(const float* from, float* to) {
  SPARK_SHARED(float, line, [64]);
  line[threadIdx.x] = from[threadIdx.x];
  if (kBarrier) __syncthreads();
  to[threadIdx.x] = line[blockDim.x - 1 - threadIdx.x];
}

// Sums in shared memory, twice into the same place: the second barrier of a round is as needed as the first.
template <bool kBarrier>
__global__ void rounds(const float* from, float* to) {
  SPARK_DYNAMIC_SHARED(float, line);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    line[threadIdx.x] = from[threadIdx.x] + round;
    __syncthreads();
    sum += line[(threadIdx.x + round + 1) % blockDim.x];
    if (kBarrier) __syncthreads();
  }
  to[threadIdx.x] = sum;
}

// Warp 0 writes after a warp operation what the others read in the round before.
template <bool kBarrier>
__global__ void runs_ahead(const float* from, float* to) {
  SPARK_SHARED(float, shared, [1]);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x < 32) {
      const float highest = __shfl_sync(0xFFFFFFFFu, from[threadIdx.x + 32 * round], 0);
      if (threadIdx.x == 0) shared[0] = highest;
    }
    __syncthreads();
    sum += shared[0];
    if (kBarrier) __syncthreads();
  }
  to[threadIdx.x] = sum;
}

__global__ void warp_sums(const float* from, float* to) {
  const int i = threadIdx.y * 32 + threadIdx.x;
  float sum = from[i];
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, bits);
  to[i] = sum + __shfl_sync(0xFFFFFFFFu, from[i], 3) + 100 * __shfl_down_sync(0xFFFFFFFFu, from[i], 30) +
          1000 * __shfl_up_sync(0xFFFFFFFFu, from[i], 1, 8) + __popc(__ballot_sync(0xFFFFFFFFu, from[i] > 0));
}

__global__ void some_leave(const float* from, float* to) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  to[threadIdx.x] = from[threadIdx.x];
}

__global__ void apart(const float* from, float* to) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  to[threadIdx.x] = from[threadIdx.x];
}

__global__ void half_a_warp(const float* from, float* to) {
  if (threadIdx.x < 48) to[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, from[threadIdx.x], 0);
}

__global__ void beyond(const float* from, float* to) {
  SPARK_SHARED(float, line, [64]);
  line[threadIdx.x + 1] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = line[threadIdx.x];
}

__global__ void block_numbers(float* to) {
  to[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z;
}

#define RUN(name, kernel, threads, bytes)                                                \
  extern "C" __attribute__((visibility("default"))) int name(const float* from, float* to) { \
    SPARK_LAUNCH(kernel, dim3(1), threads, bytes, nullptr, from, to);                    \
    return cudaGetLastError();                                                           \
  }
RUN(reverse_right, reverse<true>, dim3(64), 0)
RUN(reverse_wrong, reverse<false>, dim3(64), 0)
RUN(rounds_right, rounds<true>, dim3(64), 256)
RUN(rounds_wrong, rounds<false>, dim3(64), 256)
RUN(runs_ahead_right, runs_ahead<true>, dim3(64), 0)
RUN(runs_ahead_wrong, runs_ahead<false>, dim3(64), 0)
RUN(warps, warp_sums, dim3(32, 2), 0)
RUN(divergent, some_leave, dim3(64), 0)
RUN(two_barriers, apart, dim3(64), 0)
RUN(part_of_a_warp, half_a_warp, dim3(64), 0)
RUN(out_of_bounds, beyond, dim3(64), 0)
RUN(too_much, rounds<true>, dim3(64), 48 * 1024 + 4)
RUN(too_many, reverse<true>, dim3(64, 32), 0)

extern "C" __attribute__((visibility("default"))) int opted_in(const float* from, float* to) {
  spark::allow_shared(rounds<true>, 100 * 1024, "rounds");
  SPARK_LAUNCH(rounds<true>, dim3(1), dim3(64), 100 * 1024, nullptr, from, to);
  return cudaGetLastError();
}

extern "C" __attribute__((visibility("default"))) int numbers(float* to) {
  SPARK_LAUNCH(block_numbers, dim3(2, 3, 4), dim3(1), 0, nullptr, to);
  return cudaGetLastError();
}

extern "C" __attribute__((visibility("default"))) void round_trips(const float* from, float* half, float* bf, int n) {
  for (int i = 0; i < n; ++i) {
    half[i] = __half2float(__float2half_rn(from[i]));
    bf[i] = __bfloat162float(__float2bfloat16_rn(from[i]));
  }
}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.cu").write_text(SOURCE)
    library = build(folder / "small.so", folder / "small.cu")
    return Shim(library, state_of(library))


VALUES = torch.randint(-50, 50, (64,), generator=torch.Generator().manual_seed(0)).float()


def run(small: Shim, name: str, order: int = 0) -> torch.Tensor:
    out = torch.full_like(VALUES, torch.nan)
    with small.order(order):
        error = getattr(small.module, name)(ctypes.c_void_p(VALUES.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    if error:
        raise RuntimeError(error, small.state.problem.decode())
    return out


def same(outs: list[torch.Tensor]) -> bool:
    return all(torch.equal(out.view(torch.int32), outs[0].view(torch.int32)) for out in outs)


@pytest.mark.parametrize("kernel", ["reverse", "rounds", "runs_ahead"])
def test_a_missing_barrier_shows_in_the_order_of_threads(small: Shim, kernel: str) -> None:
    outs = [run(small, f"{kernel}_right", order) for order in ORDERS]
    expected = {
        "reverse": VALUES.flip(0),
        "rounds": sum(VALUES.roll(-1 - round) + round for round in range(3)),
        "runs_ahead": (VALUES[0] + VALUES[32]).expand(64),
    }
    assert same(outs) and torch.equal(outs[0], expected[kernel])
    assert not same([run(small, f"{kernel}_wrong", order) for order in ORDERS])
    assert not same([run(small, f"{kernel}_wrong", order) for order in (0, 1)])


def test_shared_memory_starts_as_nan(small: Shim) -> None:
    assert run(small, "reverse_wrong")[:32].isnan().all()


@pytest.mark.parametrize("order", ORDERS)
def test_warp_operations(small: Shim, order: int) -> None:
    lanes, there = VALUES.view(2, 32), torch.arange(32)
    down = torch.where(there < 2, lanes.roll(-30, 1), lanes)
    up = torch.where(there % 8 == 0, lanes, lanes.roll(1, 1))
    expected = lanes.sum(1, keepdim=True) + lanes[:, 3:4] + 100 * down + 1000 * up
    expected = expected + (lanes > 0).sum(1, keepdim=True)
    assert torch.equal(run(small, "warps", order), expected.flatten())


@pytest.mark.parametrize("order", ORDERS)
def test_what_would_hang_or_be_undefined_is_an_error(small: Shim, order: int) -> None:
    for name, message in [
        ("divergent", "only 63 of 64 threads reached the barrier"),
        ("two_barriers", "different barriers"),
        ("part_of_a_warp", "mask names a thread that has ended"),
        ("out_of_bounds", "shared memory was written outside"),
        ("too_much", "more shared memory than allowed"),
        ("too_many", "sizes of the grid or the block"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(small, name, order)
        assert torch.equal(run(small, "reverse_right", order), VALUES.flip(0))  # and the next launch runs


def test_more_shared_memory_is_allowed_when_asked_for(small: Shim) -> None:
    assert torch.equal(run(small, "opted_in"), run(small, "rounds_right"))
    assert small.state.barriers == 6 * 64


def test_grids_of_three_dimensions(small: Shim) -> None:
    out = torch.full((4, 3, 2), torch.nan)
    assert small.module.numbers(ctypes.c_void_p(out.data_ptr())) == 0
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(2), indexing="ij")
    assert torch.equal(out, (x + 10 * y + 100 * z).float())


def test_half_precision_rounds_as_pytorch_does(small: Shim) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(1))
    ties = (torch.arange(-(2**15), 2**15) << 16 | 0x8000)[:, None] + torch.tensor([-0x7000, -1, 0, 1, -0x8000])
    values = torch.cat([bits, ties.flatten()]).to(torch.int32).view(torch.float32)
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()  # all from 0 to the largest
    between = torch.cat([(halves[1:] + halves[:-1]) / 2, torch.tensor([65519.0, 65520.0, 65521.0])])
    near = torch.cat([between, torch.nextafter(between, torch.tensor(0.0)), torch.nextafter(between, 2 * between)])
    values = torch.cat([values, halves, near, -near, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    half, bf = torch.empty_like(values), torch.empty_like(values)
    small.module.round_trips(*(ctypes.c_void_p(t.data_ptr()) for t in (values, half, bf)), len(values))
    torch.testing.assert_close(half, values.half().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bf, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_address_sanitizer_finds_nothing_outside_the_tensors() -> None:
    """The kernels' tests of margins and strides once more, in a process of their own, where every access is watched."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
        if shutil.which("g++")
    ]
    if not found or not all(map(os.path.isabs, found)) or os.environ.get("CXX"):
        pytest.skip("g++ with its AddressSanitizer not found, or another compiler is asked for")
    here = Path(__file__).parent
    tests = [str(path) for path in here.glob("test_*_cuda.py") if path.name != "test_build_cuda.py"]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        # calls in place of instructions in a row: it compiles in half the time
        "SPARK_SHIM_FLAGS": "-fsanitize=address --param asan-instrumentation-with-call-threshold=0 -Wno-error",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "outside or strid", "-m", "not gpu", *tests],
        capture_output=True, text=True, env=environment, cwd=here.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 failed" in done.stdout and "AddressSanitizer: " not in done.stderr
