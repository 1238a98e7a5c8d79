"""Section "sanitizer": the small cases in bfloat16 under compute-sanitizer's memcheck and racecheck."""

from __future__ import annotations

import re
import sys

from bench.gpu.commands import run_command, tail
from bench.gpu.provenance import cuda_tool
from bench.gpu.section import NotAvailableError, Section

TOOLS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
UNUSABLE = "Device not supported"  # what compute-sanitizer says in some sandboxes
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation, so that reads beyond it are seen


def run(section: Section) -> None:
    small = [sys.executable, "-m", "bench.gpu_small", "--device", section.device, "--dtype", "bfloat16"]
    for number, tool in enumerate(TOOLS):
        share = 1 / (len(TOOLS) - number)
        section.case(tool, lambda tool=tool, share=share: check(tool, small, section.left * share))


def check(name: str, command: list[str], seconds: float) -> dict:
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        raise NotAvailableError("compute-sanitizer is not found")
    if "cpu" in command:
        raise NotAvailableError("compute-sanitizer needs a GPU")
    options = ["--tool", name, "--target-processes", "application-only", "--print-limit", "20"]
    options += ["--report-api-errors", "no"] if name == "memcheck" else []
    done = run_command([tool, *options, *command, "--quick"], seconds, ENVIRONMENT)
    if UNUSABLE in done.output:
        raise NotAvailableError(f"compute-sanitizer: {UNUSABLE}")
    return counted(name, done.code, done.output)


def counted(name: str, code: int | None, output: str) -> dict:
    """What a run printed: errors, and the small cases that passed. No summary is an error too."""
    summaries = [int(number) for number in re.findall(TOOLS[name], output)]
    entry = {"errors": sum(summaries), "cases": len(re.findall(r"^ok ", output, re.MULTILINE))}
    if code is None:
        entry["error"] = f"out of time after {entry['cases']} cases"
    elif entry["errors"] or not summaries or code != 0:
        entry["error"] = f"{entry['errors']} errors, exit status {code}"
    if "error" in entry:
        reports = [line for line in output.splitlines() if line.startswith("=========")]
        entry["output"] = reports[:40] or tail(output)
    return entry
