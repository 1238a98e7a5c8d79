"""Section "tests": what the tests say here. A test file that needs a missing package is left out, by name."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections import Counter
from pathlib import Path

from bench.gpu.commands import run_command, tail
from bench.gpu.section import Section
from bench.settings import ROOT

RUNS = {
    "gpu": (["tests/native", "tests/train/test_cuda_graph.py", "-m", "gpu"], 0.4),
    "triton": (["tests/ops", "-k", "triton", "--ignore=tests/ops/test_triton_report.py"], 1.0),
}  # the second number: share of the section's time that is left
TINY = {"gpu": (["tests/native", "-m", "gpu"], 0.5), "triton": (["tests/ops/test_backend.py", "-k", "triton"], 1.0)}
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
LINE = re.compile(rf"^(?P<test>\S.*?::.*?) (?P<outcome>{OUTCOMES})\b", re.MULTILINE)
SHARED_LINE = re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<outcome>{OUTCOMES}) (?P<test>\S.*?::.*?) *$", re.MULTILINE)
PROCESSES = 12  # of pytest-xdist, at most, where it is installed: compiling kernels takes longest
NO_TESTS = 5  # pytest's exit status


def run(section: Section) -> None:
    for name, (arguments, share) in (TINY if section.tiny else RUNS).items():
        if section.device == "cuda" and importlib.util.find_spec("xdist"):
            arguments = [*arguments, "-n", str(min(PROCESSES, os.cpu_count() or 1))]
        section.case(name, lambda arguments=arguments, share=share: run_pytest(arguments, section.left * share))


def run_pytest(arguments: list[str], seconds: float) -> dict:
    places = [ROOT / a for a in arguments if a.startswith("tests")]
    ignored = {path: lacking for place in places for path, lacking in missing_imports(place).items()}
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments]
    command += [f"--ignore={path}" for path in ignored]
    done = run_command(command, seconds)
    found = [(m["test"], m["outcome"]) for line in (LINE, SHARED_LINE) for m in line.finditer(done.output)]
    counts = Counter(outcome for _, outcome in found)
    failures = sorted({test for test, outcome in found if outcome in ("FAILED", "ERROR")})
    entry = {
        "counts": {name.lower(): counts[name] for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")},
        "failures": failures[:100], "ignored": ignored,
    }  # fmt: skip
    if done.code not in (0, NO_TESTS):
        what = "out of time" if done.code is None else f"pytest ended with {done.code}"
        entry |= {"error": f"{what}; {len(failures)} failures", "output": tail(done.output, 40)}
    return entry


def missing_imports(place: Path) -> dict[str, list[str]]:
    """Test files that cannot be imported here, and the packages that they lack."""
    files = [place] if place.is_file() else sorted(place.rglob("test_*.py"))
    found = {}
    for path in files:
        lacking = sorted(name for name in top_level_imports(path) if not _exists(name))
        if lacking:
            found[str(path.relative_to(ROOT))] = lacking
    return found


def top_level_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def _exists(name: str) -> bool:
    return (ROOT / "tests" / f"{name}.py").exists() or importlib.util.find_spec(name) is not None
