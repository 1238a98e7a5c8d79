"""The CUDA sources compile for the GPUs we ship for, and the built module loads, on a machine without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.name)
def test_nvcc_compiles_without_warnings_or_spills(source: Path, arch: str, tmp_path: Path) -> None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(f"{home}/bin/nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found (CUDACXX, PATH, CUDA_HOME)")
    command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0")}, done.stderr


def test_built_module_loads_and_reports_errors() -> None:
    if importlib.util.find_spec("spark_fast._native_cuda") is None:
        pytest.skip("spark_fast was installed without its CUDA module (no nvcc, or SPARK_FAST_CUDA=0)")
    module = importlib.import_module("spark_fast._native_cuda")
    assert module.archs
    # Without a driver the error is about that, with one about the device's number; either way before any access.
    with pytest.raises(RuntimeError, match="gather_patches: cudaError"):
        module.gather_patches(99, 0, 2, 64, (1, 1, 1, 1), 64, 1, 1, 1, 64)
    with pytest.raises(RuntimeError, match="scatter_patches: cudaError"):
        module.scatter_patches(99, 0, 2, 64, 0, 64, 1, 1, 1, 1, 1, 64)
