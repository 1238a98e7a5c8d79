"""CUDA sources built as a C++ library that runs on the CPU, by csrc/cuda_shim."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ORDERS = (0, 1, 2, 12345)  # of threads between barriers: forward, backward, two shuffles


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
    _fields_ = (*((name, ctypes.c_int64) for name in names), ("problem", ctypes.c_char * 200))


@dataclass
class Shim:
    module: ModuleType | ctypes.CDLL
    state: State

    @contextmanager
    def order(self, order: int) -> Iterator[None]:
        """Blocks, and threads between barriers, run forward (0), backward (1) or shuffled by a seed."""
        self.state.order = order
        try:
            yield
        finally:
            self.state.order = 0


def build(library: Path, *sources: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The loaded library; skips the test where there is no C++ compiler."""
    import pybind11

    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not compiler:
        pytest.skip("no C++ compiler found, so the CUDA sources cannot be run on the CPU")
    includes = [CSRC / "cuda_shim", CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [
        *compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden",
        *flags, *(f"-I{path}" for path in includes), "-x", "c++", *map(str, sources), "-o", str(library),
    ]  # fmt: skip
    if os.uname().sysname == "Darwin":
        command += ["-undefined", "dynamic_lookup", "-D_XOPEN_SOURCE=700", "-D_DARWIN_C_SOURCE"]
        command += ["-Wno-deprecated-declarations"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def state_of(library: ctypes.CDLL) -> State:
    state = library.spark_shim_state
    state.restype = ctypes.POINTER(State)
    return state().contents
