"""The CUDA sources as a C++ module that runs on the CPU: csrc/bindings_cuda.cpp and the .cu files on csrc/cuda_shim."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shlex
import sysconfig

import pytest
import torch
from cuda_shim import CSRC, MASKS, Shim, build, state_of

from spark_fast.ops import native_cuda
from spark_fast.patches import ActivePatches


@pytest.fixture(scope="session")
def shim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shim:
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if hasattr(request.config, "workerinput") else base  # one for all processes of pytest-xdist
    path = folder / f"_native_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [*sorted(CSRC.glob("*_cuda.cu")), CSRC / "bindings_cuda.cpp"]
    # Two blocks, so that small maps go several times round a kernel's grid-stride loop.
    more = shlex.split(os.environ.get("SPARK_SHIM_FLAGS", ""))  # see test_shim.py
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        flags = ("-DSPARK_MAX_BLOCKS=2", *more)
        library = ctypes.CDLL(str(path)) if path.exists() else build(path, *sources, flags=flags)
    spec = importlib.util.spec_from_file_location("_native_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Shim(module, state_of(library))


@pytest.fixture
def on_shim(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> Shim:
    """The launchers take CPU tensors and queue them on GPU 1, stream 77, of the shim."""
    monkeypatch.setattr(native_cuda, "module", lambda: shim.module)
    monkeypatch.setattr(native_cuda, "queue", lambda *_, **__: (1, 77))
    return shim


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test live."""
    if request.param == "shim":
        request.getfixturevalue("on_shim")
        return "cpu"
    if native_cuda.unavailable():
        pytest.skip(native_cuda.unavailable())
    return "cuda"


@pytest.fixture(params=MASKS)
def patches(request: pytest.FixtureRequest, device: str) -> ActivePatches:
    """Sparse batches of odd shapes, on the device."""
    return ActivePatches(torch.tensor(MASKS[request.param], dtype=torch.bool).to(device))


@pytest.fixture
def some_patches(on_shim: Shim) -> ActivePatches:
    return ActivePatches(torch.tensor(MASKS["equal"], dtype=torch.bool))
