"""Proof and time of a case on a GPU: kernels captured as a CUDA graph, timed by events with the L2 cache cleared."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from bench.harness import significant
from bench.settings import ROOT
from spark_fast.ops import backend
from spark_fast.ops.triton_launch import interpreted

sys.path.append(str(ROOT / "tests"))
from exactness import assert_as_exact

Run = Callable[[], object]
HALF = torch.bfloat16


@dataclass(frozen=True)
class Peaks:
    """What this device does at best: operations per second of half-precision and of float32 products, bytes per second
    of a copy, read and written."""

    half: float
    single: float
    copy: float

    def floor(self, flops: float, size: float, tensor_cores: bool = True) -> float:
        """Seconds."""
        return max(flops / (self.half if tensor_cores else self.single), size / self.copy)

    def described(self) -> dict[str, float]:
        return {
            "half_tflops": significant(self.half / 1e12), "single_tflops": significant(self.single / 1e12),
            "copy_tbs": significant(self.copy / 1e12),
        }  # fmt: skip


def measure_peaks(device: torch.device, tiny: bool) -> Peaks:
    """Float32 products with TF32 off run on the same cores as a depthwise convolution."""
    n, size = (64, 2**16) if tiny else (8192, 2**30)
    a, b = (torch.randn(n, n, device=device) for _ in "ab")
    low, low_b = a.to(HALF), b.to(HALF)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with exact_float32():
        single = 2 * n**3 / seconds(lambda: torch.mm(a, b), device)
    half = 2 * n**3 / seconds(lambda: torch.mm(low, low_b), device)
    return Peaks(half, single, 2 * size / seconds(lambda: target.copy_(source), device))


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 inside."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def seconds(run: Run, device: torch.device) -> float:
    """Median of calls, between events, the L2 cache cleared before each; on a CPU, where it means nothing, of one."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def capture(run: Run, device: torch.device) -> Run | None:
    """Replays `run` as a CUDA graph; None on a CPU. Raises what capturing raises, at a host sync for example."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, chooses algorithms, fills tables
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(results: object = kept) -> None:  # the results live in the graph's memory
        graph.replay()

    return replay


def time_kernels(run: Run, device: torch.device) -> dict[str, float | str]:
    """Microseconds of the kernels alone ("us", captured as a graph) and as Python calls them ("called_us")."""
    found: dict[str, float | str] = {}
    run()
    called = seconds(run, device)
    try:
        replay = capture(run, device)
        kernels = called if replay is None else seconds(replay, device)
    except RuntimeError as error:
        torch.cuda.synchronize()
        kernels, found["not_captured"] = called, str(error).splitlines()[0][:200]
    return found | {"us": significant(1e6 * kernels), "called_us": significant(1e6 * called)}


def compare(
    sides: Mapping[str, Run], dense: Mapping[str, Run], device: torch.device, peaks: Peaks, flops: float, size: float,
    tensor_cores: bool = True,
) -> dict:  # fmt: skip
    """Times of all sides, the gain of the fastest of ours over the fastest dense form, rates and share of the floor.

    "spread": how far a second measurement of the fastest of ours is from the first, relative.
    """
    times = {name: time_kernels(run, device) for name, run in (*sides.items(), *dense.items())}
    us = {name: found["us"] for name, found in times.items()}
    best, best_dense = min(sides, key=us.get), min(dense, key=us.get)
    duration = us[best] / 1e6
    entry = {
        "us": us, "called_us": {name: found["called_us"] for name, found in times.items()},
        "best": best, "dense_form": best_dense, "gains": {"dense": round(us[best_dense] / us[best], 3)},
        "of_floor": round(peaks.floor(flops, size, tensor_cores) / duration, 3),
        "tbs": significant(size / duration / 1e12),
        "spread": round(abs(float(time_kernels(sides[best], device)["us"]) / us[best] - 1), 4),
    }  # fmt: skip
    if flops:
        entry["tflops"] = significant(flops / duration / 1e12)
    loose = {name: found["not_captured"] for name, found in times.items() if "not_captured" in found}
    return entry | ({"not_captured": loose} if loose else {})


def own_backends(
    op: str, device: torch.device, dtype: torch.dtype, *case: object
) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The backends of an op that take a case here, and why the others do not. "reference" is none of them.

    Raises:
        BackendError: none would run, not even the one that is first in the order.
    """
    backend.select(op, device, dtype, *case)
    names = [name for name in candidates(op, device, dtype) if name != "reference"]
    found, absent = {}, {}
    for name in names:
        try:
            with backend.use_backend(name, op):
                found[name] = backend.select(op, device, dtype, *case)
        except backend.BackendError as error:
            absent[name] = str(error)
    return found, absent


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends of an op in their order; on a CPU with "triton" where its interpreter is on."""
    orders = backend.ORDER[op]
    half = f"{device.type} half" if dtype in (torch.float16, torch.bfloat16) else device.type
    names = list(orders.get(half) or orders.get(device.type, orders["*"]))
    if device.type == "cpu" and interpreted() and any("triton" in order for order in orders.values()):
        names.insert(0, "triton")
    return names


def forced(op: str, name: str, run: Callable[..., object]) -> Callable[..., object]:
    def with_backend(*args: object) -> object:
        with backend.use_backend(name, op):
            return run(*args)

    return with_backend


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory is NaN (integers: the largest value), so that elements which nobody wrote show.

    torch does that in its deterministic mode; with warn_only the mode refuses no operation.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def results_of(run: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Of a run into poisoned memory."""
    with poisoned():
        return list(run())


def prove_repeated(what: str, run: Callable[[], Sequence[torch.Tensor]], first: Sequence[torch.Tensor]) -> None:
    """AssertionError unless another run gives the bits of the first: nothing is read that was not written, and no sum
    depends on which block is faster."""
    for number, (now, then) in enumerate(zip(run(), first, strict=True)):
        assert torch.equal(now, then), f"{what}, result {number}: two runs differ"


def prove(
    what: str,
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
    oracle: Sequence[torch.Tensor],
    terms: Sequence[int],
) -> None:
    """AssertionError unless each of `ours` is as exact as PyTorch's own result in the same dtype, by the rule of the
    tests. `terms`: products in the longest sum of each."""
    for number, (mine, other, true, count) in enumerate(zip(ours, theirs, oracle, terms, strict=True)):
        assert_as_exact(mine, other, true, f"{what}, result {number}", count)
