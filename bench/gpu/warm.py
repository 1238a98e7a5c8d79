"""Runs every measured kernel once, so that its compiled form is on disk: `python -m bench.gpu.warm --part I --of N`.

Triton compiles a kernel in a second or so, one after the other; several processes share that out before the timing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.gpu import conv_ops, nets, row_ops
from bench.gpu.conv_ops import Problem
from bench.gpu.measure import HALF, own_backends
from bench.gpu.section import Section
from bench.settings import ROOT

MOST = 6  # processes
IMAGES = 8  # of a network: its kernels do not depend on their number
Job = Callable[[], object]


def start_all(section: Section, seconds: float) -> dict:
    """All parts at the same time; what is not done by then, the timing compiles itself."""
    count = max(1, min(MOST, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-m", "bench.gpu.warm", "--of", str(count), "--device", section.device]
    command += ["--tiny"] * section.tiny
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    processes = [subprocess.Popen([*command, "--part", str(part)], **quiet) for part in range(count)]
    end, finished = time.monotonic() + seconds, 0
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
            finished += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {"processes": count, "finished": finished}


def jobs(section: Section) -> Iterator[Job]:
    """In the order of the timing, but for the networks, which take longest."""
    from bench.gpu.ops import patches_of

    for model in nets.MODELS:
        yield lambda model=model: encoder_pass(section, model)
    patches = patches_of(section)
    for layer, direction in conv_ops.cases():
        yield lambda layer=layer, direction=direction: one_layer(Problem(layer, patches, section.tiny), direction)
    for spec in row_ops.specs(patches, section.tiny):
        yield lambda spec=spec: row_ops.run_once(spec.make())


def encoder_pass(section: Section, model: str) -> None:
    encoder = nets.make_encoder(model, section.device).train()
    batch = nets.batch_of(section, 2 if section.tiny else IMAGES)
    nets.pass_of(encoder, lambda: nets.sparse_maps(encoder, batch), batch.images.device)()


def one_layer(problem: Problem, direction: str) -> None:
    found, _ = own_backends(problem.op, problem.x.device, HALF, *problem.case)
    if "triton" in found:
        problem.ours(found["triton"], direction)()


def main(arguments: list[str] | None = None) -> int:
    """The number of jobs of this part that failed; the timing says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args(arguments)
    section = Section(Path("no cases"), chosen.device, chosen.tiny)
    failed = 0
    for number, job in enumerate(jobs(section)):
        if number % chosen.of == chosen.part:
            failed += 1
            with contextlib.suppress(Exception):
                job()
                failed -= 1
    if chosen.device == "cuda":
        torch.cuda.synchronize()
    return failed


if __name__ == "__main__":
    sys.exit(main())
