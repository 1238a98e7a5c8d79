"""What every result carries: the machine (no names), versions, commit and threads."""

from __future__ import annotations

import platform
import subprocess

import pytest
import torch

import spark_fast
from spark_fast.ops import native


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
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info.clear()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit_info["id"] = commit.stdout.strip() or "unknown"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
