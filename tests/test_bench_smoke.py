"""Every benchmark runs, tiny, in a process of its own; its results fill every table. Nothing is measured here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_suite_runs_and_fills_every_table(tmp_path, monkeypatch):
    saved = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", f"--benchmark-json={saved}"]
    # pytest-benchmark would think itself in one of the processes that share these tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    environment["SPARK_FAST_BENCH"] = "tiny"
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    result = json.loads(saved.read_text())
    assert result["machine_info"]["tiny"]
    assert all(case["extra_info"]["kind"] for case in result["benchmarks"])
    assert "data" not in result["benchmarks"][0]["stats"]

    monkeypatch.syspath_prepend(str(ROOT))
    report = importlib.import_module("bench.report")
    parts = report.sections(result, result, result, result)
    optional = {"spconv"} if importlib.util.find_spec("spconv") is None else set()
    if not Path("/proc/self/clear_refs").exists():
        optional.add("memory")
    assert {name for name, text in parts.items() if report.tables.NOT_MEASURED in text} == optional
    assert "resnet50" in report.readme_table(result)
