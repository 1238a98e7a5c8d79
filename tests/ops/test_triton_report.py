"""Triton kernels compile for sm_80 and sm_90 without a GPU and spill nothing, and the committed report is of them.

The report covers every kernel in every shipped configuration and type. Those are compared with it by their source, and
a part of them is compiled anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spark_fast.ops import triton_launch

ROOT = Path(__file__).resolve().parents[2]
REPORT = json.loads((ROOT / "bench/results/triton_report.json").read_text())
COMMITTED = REPORT["kernels"]
KEY = ("kernel", "case", "config", "arch", "source")


def key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All kernels' keys, and the figures of those compiled; by another process: here Triton may be an interpreter."""
    if triton_launch.unavailable():
        pytest.skip(triton_launch.unavailable())
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.triton_report", "--tests", str(folder / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (folder / "report.json").exists(), done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_no_kernel_spills(made):
    assert [row for row in made["compiled"] if row["stack"]] == []


@pytest.mark.slow
def test_the_committed_report_is_of_these_kernels(made):
    """A difference: `python -m bench.triton_report` brings the report up to date."""
    assert {key(row) for row in made["all"]} == {key(row) for row in COMMITTED}


@pytest.mark.slow
def test_every_kernel_and_configuration_is_compiled(made):
    def configurations(rows: list[dict], dtype: str, arch: int) -> set[tuple]:
        return {(row["kernel"], row["config"]) for row in rows if dtype in row["case"] and row["arch"] == arch}

    for dtype, arch in (("bfloat16", 80), ("bfloat16", 90), ("float32", 80)):
        assert configurations(made["all"], dtype, arch) == configurations(made["compiled"], dtype, arch)
    assert {row["kernel"] for row in made["all"]} == {row["kernel"] for row in made["compiled"] if row["arch"] == 90}


@pytest.mark.slow
def test_kernels_compile_to_what_the_committed_report_says(made):
    if made["triton"] != REPORT["triton"]:
        pytest.skip(f"the report was made by Triton {REPORT['triton']}, this is {made['triton']}")
    rows = {key(row): row for row in COMMITTED}
    assert [row for row in made["compiled"] if row != rows[key(row)]] == []


def test_the_committed_report_has_no_spills_and_covers_all_types_and_architectures():
    assert not any(row["stack"] for row in COMMITTED)
    for dtype in ("bfloat16", "float16", "float32"):
        assert {row["arch"] for row in COMMITTED if row["case"].endswith(dtype)} == {80, 90}


@pytest.mark.slow
def test_half_precision_products_use_tensor_cores(made):
    kernels = ("gather_gemm", "outer_product", "hidden_product", "grad_hidden_product")
    for rows in (made["compiled"], COMMITTED):
        products = [r for r in rows if r["kernel"] in kernels and "float32" not in r["case"]]
        assert products and all(row["products"] in ("mma", "wgmma") for row in products)
        assert any(row["products"] == "wgmma" for row in products if row["arch"] == 90)


def test_shared_memory_is_what_a_block_may_use():
    """Also with two blocks on a multiprocessor. KiB: 163 of a block on sm_80, 227 on sm_90."""
    most = {80: 163, 90: 227}
    assert not [row for row in COMMITTED if 2 * row["shared"] > 1024 * most[row["arch"]]]


def test_tiles_of_64_rows_use_the_matrix_units_of_sm_90():
    """wgmma takes 64 rows: BLOCK_C of 32 and 16, for few channels, cannot."""
    rows = [r for r in COMMITTED if r["kernel"] in ("gather_gemm", "outer_product") and r["arch"] == 90]
    wide = [r for r in rows if "float32" not in r["case"] and not r["config"].startswith(("C=32 ", "C=16 "))]
    assert len(wide) > 100 and {row["products"] for row in wide} == {"wgmma"}
