"""Section "build": the compiled modules load, or are built; for which GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import time

from bench.gpu.commands import run_command, tail
from bench.gpu.provenance import cuda_tool
from bench.gpu.section import NotAvailableError, Section
from bench.settings import ROOT

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])  # as setup.py looks
LOADS = "import torch, spark_fast._native, spark_fast._native_cuda"
PIP = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", ".")


def run(section: Section) -> None:
    needed = LOADS if section.device == "cuda" else LOADS.rsplit(",", 1)[0]
    section.case("modules load", lambda: build(section, needed))
    section.case("architectures", architectures, optional=True)


def build(section: Section, needed: str) -> dict:
    """By pip; where that fails, as with an old setuptools, by cmake alone, which the entry tells."""
    if run_command([sys.executable, "-c", needed], 60).code == 0:
        return {"built": False}
    if section.device != "cuda":
        raise NotAvailableError("spark_fast._native does not load: pip install -e .")
    start, environment, outputs = time.monotonic(), {"SPARK_FAST_CUDA": "1", **own_architecture()}, []
    for by, commands in (("pip", [[sys.executable, *PIP]]), ("cmake", cmake_commands(environment))):
        for command in commands:
            done = run_command(command, section.left, environment)
            outputs += [] if done.code == 0 else [f"{by}:", *tail(done.output)]
            if done.code != 0:
                break
        loads = run_command([sys.executable, "-c", needed], 60)
        if loads.code == 0:
            break
        outputs += tail(loads.output, 3)
    entry = {"built": by, "build_seconds": round(time.monotonic() - start, 1), **environment}
    entry |= {"output": outputs} if outputs else {}
    return entry if loads.code == 0 else entry | {"error": "out of time" if section.left <= 0 else "the build failed"}


def own_architecture() -> dict[str, str]:
    """The one GPU that is here: half of the compiler's work."""
    if "SPARK_FAST_CUDA_ARCHS" in os.environ or not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    found = re.fullmatch(r"(\d+)\.(\d)\s*", run_command(query, 20).output)
    return {"SPARK_FAST_CUDA_ARCHS": "".join(found.groups())} if found else {}


def cmake_commands(environment: dict[str, str]) -> list[list[str]]:
    """What setup.py runs, into the package's folder; none without pybind11 or nvcc."""
    cmake, nvcc = shutil.which("cmake", path=PATH), cuda_tool("nvcc")
    found = run_command([sys.executable, "-m", "pybind11", "--cmakedir"], 20)
    if not cmake or not nvcc or found.code != 0:
        return []
    folder = str(ROOT / "build" / "gpu-check")
    archs = environment.get("SPARK_FAST_CUDA_ARCHS", os.environ.get("SPARK_FAST_CUDA_ARCHS", "80;90"))
    settings = {
        "Python_EXECUTABLE": sys.executable, "pybind11_DIR": found.output.strip(), "SPARK_FAST_CUDA": "ON",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(ROOT / "spark_fast"), "CMAKE_CUDA_COMPILER": nvcc,
        "SPARK_FAST_CUDA_ARCHS": archs,
    }  # fmt: skip
    return [
        [cmake, "-S", str(ROOT), "-B", folder, *(f"-D{name}={value}" for name, value in settings.items())],
        [cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)],
    ]


def architectures() -> dict:
    """Of the machine code in the CUDA module."""
    spec, tool = importlib.util.find_spec("spark_fast._native_cuda"), cuda_tool("cuobjdump")
    if spec is None or tool is None:
        raise NotAvailableError("no CUDA module" if spec is None else "cuobjdump is not found")
    listed = run_command([tool, "--list-elf", spec.origin], 20).output
    ptx = run_command([tool, "--list-ptx", spec.origin], 20).output
    return {"sass": sorted(set(re.findall(r"sm_\w+", listed))), "ptx": sorted(set(re.findall(r"sm_\w+", ptx)))}
