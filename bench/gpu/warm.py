"""Compiles the kernels of the steps and the ops into Triton's cache: `python -m bench.gpu.warm --part I --of N`.

Triton compiles a kernel in half a second to four, one after the other; several processes share that out before the
timing. Each goes through all jobs without running a kernel of ours, and compiles its share of the launches.
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
from typing import Any
from zlib import crc32

import torch

import spark_fast as sf
from bench.gpu import conv_ops, nets, row_ops, step
from bench.gpu.conv_ops import Problem
from bench.gpu.measure import HALF, own_backends
from bench.gpu.section import Section
from bench.settings import ROOT
from spark_fast.ops import triton_launch, tuning

MOST = 12  # processes
IMAGES = 8  # the kernels do not depend on their number
Job = Callable[[], object]


def start_all(section: Section, seconds: float, every: bool = False) -> dict:
    """All parts at the same time; what is not done by then, the timing compiles itself.

    Args:
        every: all configurations, not only the one that would run.
    """
    count = max(1, min(MOST, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "bench.gpu.warm", "--of", str(count), "--device", section.device]
    command += ["--tiny"] * section.tiny + ["--every"] * every
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    processes = [subprocess.Popen([*command, "--part", str(part)], **quiet) for part in range(count)]
    end, codes = time.monotonic() + seconds, []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {"processes": count, "finished": len(codes), "failed": sum(code != 0 for code in codes)}


def jobs(section: Section, images: int) -> Iterator[tuple[str, Job]]:
    """By name; what pays most comes first."""
    from bench.gpu.ops import patches_of

    images = 2 if section.tiny else images
    for model in nets.MODELS:
        yield f"{model} step", lambda model=model: one_step(section, model, nets.batch_of(section, images))
    patches = sf.ActivePatches(patches_of(section).active[:images])
    for layer, direction in conv_ops.cases():
        yield (
            conv_ops.name_of(layer, direction),
            lambda layer=layer, direction=direction: one_layer(Problem(layer, patches, section.tiny), direction),
        )
    for spec in row_ops.specs(patches, section.tiny):
        yield spec.name, lambda spec=spec: row_ops.run_once(spec.make())


def maps_of_layers(section: Section) -> Iterator[tuple[str, Job]]:
    """What the proofs of convolutions do besides: maps, and rows of maps."""
    from bench.gpu.ops import patches_of

    patches = sf.ActivePatches(patches_of(section).active[:IMAGES])
    for layer in conv_ops.LAYERS:
        yield f"maps of {layer.name}", lambda layer=layer: maps_of(Problem(layer, patches, section.tiny))


def one_step(section: Section, model: str, batch: nets.Batch) -> None:
    spark = step.make_spark(section, model)
    step.TrainingStep(spark, model, lambda: spark(batch.images, batch.active), True, batch.images.shape[0]).gradients()


def one_layer(problem: Problem, direction: str) -> None:
    found, _ = own_backends(problem.op, problem.x.device, HALF, *problem.case)
    if "triton" in found:
        problem.ours(found["triton"], direction)()


def maps_of(problem: Problem) -> None:
    for rows in (problem.x, problem.grad):
        dense = problem.map_of(rows)
        for dtype in (HALF, torch.float64):
            sf.SparseTensor.from_dense(dense.to(dtype), problem.patches)


@contextlib.contextmanager
def sharing(part: int, of: int, every: bool, compiled: Callable[..., object]) -> Iterator[None]:
    """Inside, no kernel is launched: each new launch whose turn it is goes to compiled(kernel, args, constants).

    Args:
        every: with each configuration that the kernel may run with.
    """
    seen: set[tuple] = set()
    describe, best = triton_launch._describe, tuning.best

    def note(kernel: Any, args: tuple, constants: dict[str, Any]) -> triton_launch.Launch:
        launch = describe(kernel, args, constants)
        if launch.key not in seen and crc32(repr(launch.key).encode()) % of == part:
            compiled(kernel, args, constants)
        seen.add(launch.key)
        return launch

    def all_of(kernel: str, case: tuple, rows: int, configs, function, device) -> None:
        if not kernel.endswith(".backend"):  # a trial of backends runs those that are not Triton's
            for config in configs:
                function(config)

    triton_launch._describe = note
    tuning.best = all_of if every else best
    try:
        # In this thread: PyTorch's own threads for backward passes would not know that launches are only listed.
        with triton_launch.recording(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        triton_launch._describe, tuning.best = describe, best


def compile_only(kernel: Any, args: tuple, constants: dict[str, Any]) -> None:
    """By the way that a launch goes, tensors as PyTorch allocates them."""
    kernel.warmup(*(a.dtype if isinstance(a, torch.Tensor) else a for a in args), grid=(1, 1, 1), **constants)


def main(arguments: list[str] | None = None) -> int:
    """The number of jobs that failed; the timing says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--every", action="store_true", help="all configurations, not only the one that would run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args(arguments)
    section = Section(Path("no cases"), chosen.device, chosen.tiny)
    failed = 0
    compiled = compile_only if chosen.device == "cuda" else lambda *launch: None  # the interpreter compiles nothing
    with sharing(chosen.part, chosen.of, chosen.every, compiled):
        for name, job in (*jobs(section, IMAGES), *maps_of_layers(section)):
            try:
                job()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
