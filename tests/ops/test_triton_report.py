"""Every Triton kernel in every shipped configuration compiles for sm_80 and sm_90 without a GPU, and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spark_fast.ops import triton_launch

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads((ROOT / "bench/results/triton_report.json").read_text())
KEY = ("kernel", "case", "config", "arch")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Compiled in a process of its own, since in this one Triton may be an interpreter."""
    if triton_launch.unavailable():
        pytest.skip(triton_launch.unavailable())
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.triton_report", "--json", str(folder / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (folder / "report.json").exists(), done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_no_kernel_spills(compiled):
    assert [row for row in compiled if row["stack"]] == []


@pytest.mark.slow
def test_the_committed_report_is_of_these_kernels(compiled):
    assert {tuple(row[k] for k in KEY) for row in compiled} == {tuple(row[k] for k in KEY) for row in COMMITTED}


def test_the_committed_report_has_no_spills_and_covers_both_architectures():
    assert {row["arch"] for row in COMMITTED} == {80, 90}
    assert not any(row["stack"] for row in COMMITTED)


@pytest.mark.slow
def test_half_precision_products_use_tensor_cores(compiled):
    rows = [
        row for row in compiled if row["kernel"] in ("gather_gemm", "outer_product") and "float32" not in row["case"]
    ]
    assert rows and all(row["products"] in ("mma", "wgmma") for row in rows)
    assert any(row["products"] == "wgmma" for row in rows if row["arch"] == 90)
