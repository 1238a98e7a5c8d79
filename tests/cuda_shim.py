"""CUDA sources built as a C++ library that runs on the CPU, by csrc/cuda_shim."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ORDERS = (0, 1, 2, 12345)  # of threads between barriers: forward, backward, and shuffles by a seed

MASKS = {  # of batches of odd shapes
    "equal": [[[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [1, 0, 0]]],
    "unequal": [[[0, 0, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 1]]],
    "all": [[[1, 1], [1, 1]]],
    "one": [[[0, 0, 0], [0, 1, 0], [0, 0, 0]]],
    "none": [[[0, 0, 0], [0, 0, 0]]],
}


class State(ctypes.Structure):
    """spark_shim::State of csrc/cuda_shim/cuda_runtime.h."""

    names = (
        "device",
        "fail_next",
        "launches",
        "launch_device",
        "stream",
        "element_size",
        "blocks",
        "threads_x",
        "threads_y",
        "order",
        "shared_bytes",
        "barriers",
    )
    _fields_ = (
        *((name, ctypes.c_int64) for name in names),
        ("problem", ctypes.c_char * 200),
        ("shared_at_most", ctypes.c_int64),
    )


@dataclass
class Shim:
    module: ModuleType | ctypes.CDLL
    state: State

    def same_in_every_order(self, run: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """What `run` gives. Fails unless it is the same bits, and no NaN, in every order of blocks and threads."""
        first = None
        for order in ORDERS:
            with self.order(order):
                out = run()
            assert not any(t.isnan().any() for t in out), f"NaN in order {order} of threads; is a barrier missing?"
            bits = [t.flatten().view(torch.uint8) for t in out]
            first = first or bits
            assert all(map(torch.equal, bits, first)), f"other bits in order {order} of threads; is a barrier missing?"
        return out

    @contextmanager
    def order(self, order: int) -> Iterator[None]:
        """Blocks, and threads between barriers, run forward (0), backward (1) or shuffled by a seed."""
        self.state.order = order
        try:
            yield
        finally:
            self.state.order = 0


def build(library: Path, *sources: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The loaded library, its sources compiled side by side; skips the test where there is no C++ compiler."""
    import pybind11

    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not compiler:
        pytest.skip("no C++ compiler found, so the CUDA sources cannot be run on the CPU")
    includes = [CSRC / "cuda_shim", CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    compiling = [
        *compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC",
        "-fvisibility=hidden", *(f"-I{path}" for path in includes), *flags,
    ]  # fmt: skip
    linking = [*compiler, "-shared", *flags]
    if os.uname().sysname == "Darwin":
        compiling += ["-D_XOPEN_SOURCE=700", "-D_DARWIN_C_SOURCE", "-Wno-deprecated-declarations"]
        linking += ["-undefined", "dynamic_lookup"]
    objects = [library.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [
            pool.submit(subprocess.run, [*compiling, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
            for source, target in zip(sources, objects, strict=True)
        ]:
            done.result()
    subprocess.run([*linking, *map(str, objects), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def state_of(library: ctypes.CDLL) -> State:
    state = library.spark_shim_state
    state.restype = ctypes.POINTER(State)
    return state().contents


def guarded(shape: tuple[int, ...], dtype: torch.dtype, margin: int = 64) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A tensor of NaN between margins, and whether the margins are still untouched."""
    count = torch.Size(shape).numel()
    memory = torch.full((margin + count + margin,), torch.nan).to(dtype)
    edges = memory[:margin], memory[margin + count :]
    before = [edge.view(torch.uint8).clone() for edge in edges]
    return memory[margin : margin + count].view(shape), lambda: all(
        torch.equal(edge.view(torch.uint8), was) for edge, was in zip(edges, before, strict=True)
    )
