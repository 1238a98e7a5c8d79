"""What every result carries: the machine (no names), versions, commit, threads, allocator and measured ceilings."""

from __future__ import annotations

import gc
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import spark_fast
from bench import settings
from bench.ceilings import Ceilings, measure_ceilings
from spark_fast.ops import native

KEPT_STATS = ("min", "median", "rounds")
measured: dict[str, float] = {}


def pytest_configure(config: pytest.Config) -> None:
    keep = getattr(spark_fast, "keep_memory", None)
    if settings.ALLOCATOR == "kept" and keep is not None:
        keep()  # freed memory stays in the process: both sides profit, dense more


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # what the imports made is never garbage: each case's collection looks at its own objects only


def _allocator() -> str:
    return settings.ALLOCATOR if hasattr(spark_fast, "keep_memory") else "default"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.machine()),
        cores=cpu.get("count"),
        threads=torch.get_num_threads(),
        instruction_set=native.module().isa(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        spark_fast=spark_fast.__version__,
        allocator=_allocator(),
        tiny=settings.TINY,
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info.clear()
    run = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)bench/results"]
    changed = subprocess.run(status, **run).stdout.strip()
    commit_info["id"] = commit or "unknown"
    commit_info["changed"] = bool(changed)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Leaves out what no table shows: raw times, options, parameters that extra_info repeats."""
    output_json["machine_info"].update(measured)
    output_json["benchmarks"] = [
        {
            "name": case["name"],
            "extra_info": case["extra_info"],
            "stats": {name: float(f"{case['stats'][name]:.4g}") for name in KEPT_STATS},
        }
        for case in output_json["benchmarks"]
    ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    """This machine's best rates, measured once per run."""
    found = measure_ceilings()
    measured.update(gemm_gflops=round(found.gemm / 1e9, 1), copy_gbs=round(found.copy / 1e9, 1))
    return found
