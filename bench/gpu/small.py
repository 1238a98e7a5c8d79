"""Section "small": every op by every backend of ours on tiny odd shapes against float64, forward and backward.

Each op, backend and dtype has a process of its own, several at a time, so that a crash takes no other along and
compiling is shared out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import gpu_small
from bench.gpu.commands import run_command, tail
from bench.gpu.measure import candidates
from bench.gpu.section import Section

COMMAND = (sys.executable, "-m", "bench.gpu_small")


def run(section: Section) -> None:
    parts = {"bfloat16": ["--dtype", "bfloat16"]} if section.tiny else dict(parts_of(section.device))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        seconds = section.left
        started = {
            name: pool.submit(run_small, [*COMMAND, "--device", section.device, *arguments], seconds)
            for name, arguments in parts.items()
        }
        for name, running in started.items():
            section.case(name, running.result)


def parts_of(device: str) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each process; what compiles most kernels comes first."""
    ops = dict.fromkeys(case.op for case in gpu_small.cases(gpu_small.small_patches()))
    for op in ops:
        for dtype in gpu_small.DTYPES:
            for backend in candidates(op, torch.device(device), dtype):
                if backend in gpu_small.OWN:
                    short = str(dtype).removeprefix("torch.")
                    yield f"{op} {backend} {short}", ["--op", op, "--backend", backend, "--dtype", short]


def run_small(command: list[str], seconds: float) -> dict:
    done = run_command(command, seconds)
    entry = {"cases": len(re.findall(r"^ok ", done.output, re.MULTILINE))}
    if done.code != 0:
        entry |= {"error": "out of time" if done.code is None else f"ended with {done.code}"}
        wrong = [line for line in done.output.splitlines() if line.startswith("WRONG")]
        entry |= {"output": [line[:500] for line in wrong[:20]] + tail(done.output, 10)}
    return entry
