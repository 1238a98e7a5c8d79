"""Section "build": the compiled modules load, or are built; for which GPUs."""

from __future__ import annotations

import importlib.util
import re
import sys
import time

from bench.gpu.commands import run_command, tail
from bench.gpu.provenance import cuda_tool
from bench.gpu.section import NotAvailableError, Section

LOADS = "import torch, spark_fast._native, spark_fast._native_cuda"
PIP = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", ".")


def run(section: Section) -> None:
    needed = LOADS if section.device == "cuda" else LOADS.rsplit(",", 1)[0]
    section.case("modules load", lambda: build(section, needed))
    section.case("architectures", architectures, optional=True)


def build(section: Section, needed: str) -> dict:
    if run_command([sys.executable, "-c", needed], 60).code == 0:
        return {"built": False}
    if section.device != "cuda":
        raise NotAvailableError("spark_fast._native does not load: pip install -e .")
    start = time.monotonic()
    done = run_command([sys.executable, *PIP], section.left, {"SPARK_FAST_CUDA": "1"})
    entry = {"built": True, "build_seconds": round(time.monotonic() - start, 1)}
    loads = run_command([sys.executable, "-c", needed], 60)
    if done.code != 0 or loads.code != 0:
        entry["error"] = "out of time" if done.code is None else "the build failed"
        entry["output"] = tail(done.output) + tail(loads.output, 3)
    return entry


def architectures() -> dict:
    """Of the machine code in the CUDA module."""
    spec, tool = importlib.util.find_spec("spark_fast._native_cuda"), cuda_tool("cuobjdump")
    if spec is None or tool is None:
        raise NotAvailableError("no CUDA module" if spec is None else "cuobjdump is not found")
    listed = run_command([tool, "--list-elf", spec.origin], 20).output
    ptx = run_command([tool, "--list-ptx", spec.origin], 20).output
    return {"sass": sorted(set(re.findall(r"sm_\w+", listed))), "ptx": sorted(set(re.findall(r"sm_\w+", ptx)))}
