"""Section "provenance": which GPU, driver and versions."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from bench.gpu.section import NotAvailableError, Section

QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def run(section: Section) -> None:
    section.case("nvidia-smi", nvidia_smi, optional=True)
    section.case("nvcc", nvcc, optional=True)
    section.case("machine", lambda: machine(section.device))


def machine(device: str) -> dict:
    import timm
    import torch

    import spark_fast

    found = {
        "gpu": platform.machine() if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "timm": timm.__version__, "triton": triton_version(),
        "spark_fast": spark_fast.__version__, "cpu_threads": torch.get_num_threads(),
    }  # fmt: skip
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"capability": f"{gpu.major}.{gpu.minor}", "sms": gpu.multi_processor_count}
        found |= {"memory_gib": round(gpu.total_memory / 2**30, 1)}
    return found


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def nvidia_smi() -> dict:
    if not shutil.which("nvidia-smi"):
        raise NotAvailableError("nvidia-smi is not on PATH")
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return dict(zip(QUERY, (value.strip() for value in done.stdout.strip().split(",")), strict=True))


def cuda_tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [str(Path(home, "bin", name)) for home in homes if home]
    return next(filter(None, map(shutil.which, [*places, name])), None)


def nvcc() -> dict:
    tool = cuda_tool("nvcc")
    if tool is None:
        raise NotAvailableError("nvcc is not found")
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    return {"nvcc": re.search(r"release ([\d.]+)", text)[1]}
