"""The CUDA sources as a C++ module that runs on the CPU: csrc/bindings_cuda.cpp and the .cu files on csrc/cuda_shim."""

from __future__ import annotations

import importlib.util
import sysconfig

import pytest
from cuda_shim import CSRC, Shim, build, state_of


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    path = tmp_path_factory.mktemp("shim") / f"_native_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [*sorted(CSRC.glob("*_cuda.cu")), CSRC / "bindings_cuda.cpp"]
    # Two blocks, so that small maps go several times round a kernel's grid-stride loop.
    library = build(path, *sources, flags=("-DSPARK_MAX_BLOCKS=2",))
    spec = importlib.util.spec_from_file_location("_native_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Shim(module, state_of(library))
