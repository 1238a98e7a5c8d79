"""The general op: 3x3 convolution of random pixels, patches of one pixel each, over their density, forward + backward.

Against dense convolution of the zero-filled map, in the faster of two memory formats, and on one thread against
spconv's CPU build where it is installed (see `bench_spconv.py`). `sparse with tables` makes the tables of the active
pixels anew from their coordinates, as a new mask asks for; spconv's rulebook is its counterpart.
"""

from __future__ import annotations

import pytest
import torch

import spark_fast as sf
from bench.harness import Side, Work, note, prove, time_in_turns, tolerance
from bench.layers import Layer, Problem
from bench.settings import BATCH, TINY

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIZE = 12 if TINY else 56  # pixels of a map


def _with_tables(problem: Problem) -> Side:
    coords, shape = problem.patches.coords.clone(), tuple(problem.patches.active.shape)

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return sf.nn.functional.conv2d(sf.SparseTensor.from_coords(x, coords, shape), w, padding=1).features

    return Side(call, (problem.x, problem.w), problem.grad)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_pixel_masks(benchmark, threads: int, channels: int, density: float) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        active = torch.rand(BATCH, SIZE, SIZE) < density
        problem = Problem(Layer("pixels", 1, channels, channels, mask_ratio=1 - density), sf.ActivePatches(active))
        measure(benchmark, problem, density, threads)
    finally:
        torch.set_num_threads(before)


def measure(benchmark, problem: Problem, density: float, threads: int) -> None:
    found = problem.sides()
    dense = found["dense"]
    plain = [t.contiguous() for t in (*dense.inputs, dense.grad)]
    sides = {
        "sparse": found["sparse"],
        "sparse with tables": _with_tables(problem),
        "dense channels_last": dense,
        "dense contiguous": Side(dense.call, plain[:2], plain[2], dense.rows),
    }
    bound = tolerance(max(problem.terms(d) for d in ("forward", "grad_input", "grad_weight")))
    truth = dense.results("all")
    for name, side in sides.items():
        prove(name, side.results("all"), truth, bound)
    runs = {name: side.run("all") for name, side in sides.items()}
    info = dict(problem.info(), kind="pixels", op="conv", direction="all", threads=threads, density=density)
    if threads == 1:
        try:
            from bench import spconv_cpu
        except ImportError:
            pass
        else:
            peer = spconv_cpu.Peer(problem)
            prove("spconv", peer.results(), truth, bound)
            runs |= {"spconv": peer.run, "spconv with rulebook": lambda: peer.run(rulebook=True)}
            info["spconv"] = spconv_cpu.VERSION
    seconds = time_in_turns(runs)
    benchmark.pedantic(runs["sparse"], rounds=1 if TINY else 3, warmup_rounds=0)
    note(benchmark, seconds, None, Work(3 * problem.work("forward").flops, 0), **info)
