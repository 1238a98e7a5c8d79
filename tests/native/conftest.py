"""The CUDA sources as a C++ module that runs on the CPU: csrc/bindings_cuda.cpp and the .cu files on csrc/cuda_shim."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


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
    )
    _fields_ = tuple((name, ctypes.c_int64) for name in names)


@dataclass
class Shim:
    module: ModuleType
    state: State


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    import pybind11

    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if not compiler:
        pytest.skip("no C++ compiler found, so the CUDA sources cannot be run on the CPU")
    library = tmp_path_factory.mktemp("shim") / f"_native_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [CSRC / "cuda_shim", CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [
        *compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden",
        "-DSPARK_MAX_BLOCKS=2",  # so that small maps go several times round a kernel's grid-stride loop
        *(f"-I{path}" for path in includes), "-x", "c++", *map(str, sorted(CSRC.glob("*_cuda.cu"))),
        str(CSRC / "bindings_cuda.cpp"), "-o", str(library),
    ]  # fmt: skip
    if os.uname().sysname == "Darwin":
        command += ["-undefined", "dynamic_lookup"]
    subprocess.run(command, check=True)
    spec = importlib.util.spec_from_file_location("_native_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = ctypes.CDLL(str(library)).spark_shim_state
    state.restype = ctypes.POINTER(State)
    return Shim(module, state().contents)
