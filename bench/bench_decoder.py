"""The decoder, and the densify projections in front of it, forward + backward, against plain channels-last PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spark_fast as sf
from bench.harness import Work, note, prove_with_kinks, time_in_turns
from bench.nets import PlainDecoder, PlainDensify, stir
from bench.settings import BATCH, GRID, MASK_RATIO, TINY

NETS = {
    "resnet50": ([2048, 1024, 512, 256], "bn"),
    "convnext_small": ([768, 384, 192, 96], "ln"),
}
WIDTH = 32 if TINY else 768
FEW = min(2, BATCH)  # images in the proof, of which float64 is slow


@dataclass
class Run:
    """A module, its input maps (coarsest first) and how to call it on them.

    rows: a gradient of an input map as rows, for the comparison.
    """

    module: nn.Module
    maps: list[torch.Tensor]
    call: Callable[[nn.Module, list[torch.Tensor]], torch.Tensor | list[torch.Tensor]] = lambda module, x: module(x)
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda grad: grad

    def step(self, grads: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Forward + backward: outputs, gradients of the maps and of the parameters."""
        leaves = [x.detach().requires_grad_() for x in self.maps]
        wanted = leaves + list(self.module.parameters())

        def forward_backward() -> list[torch.Tensor]:
            outputs = _as_list(self.call(self.module, leaves))
            return outputs + list(torch.autograd.grad(outputs, wanted, grads))

        return forward_backward

    def results(self, grads: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """What `step` gives in evaluation mode, where dense batch norms mean the same; flat float64."""
        module = copy.deepcopy(self.module).eval().to(dtype)
        run = Run(module, [x.to(dtype) for x in self.maps], self.call)
        found, first = run.step([g.to(dtype) for g in grads])(), len(grads)
        last = first + len(self.maps)
        found[first:last] = [self.rows(g) for g in found[first:last]]
        return [t.detach().double().flatten() for t in found]


def test_decoder(benchmark, ceilings) -> None:
    decoder = stir(sf.Decoder(32, WIDTH))
    plain = PlainDecoder(decoder).to(memory_format=torch.channels_last)

    def runs(batch: int) -> tuple[Run, Run]:
        sizes = [(batch, WIDTH >> k, GRID[0] << k, GRID[1] << k) for k in range(4)]
        maps = [torch.randn(size).to(memory_format=torch.channels_last) for size in sizes]
        return Run(decoder, maps), Run(plain, maps)

    compare(benchmark, ceilings, runs, op="decoder", net="all", all_dense=True)


@pytest.mark.parametrize("model", list(NETS))
def test_densify(benchmark, ceilings, model: str) -> None:
    """All four stages: norm, fill with the mask token, projection."""
    channels, norm = NETS[model]
    channels = [max(8, c // 32) for c in channels] if TINY else channels
    densify = stir(sf.Densify(channels, [WIDTH >> k for k in range(4)], norm))
    plain = PlainDensify(densify).to(memory_format=torch.channels_last)

    def runs(batch: int) -> tuple[Run, Run]:
        patches = sf.ActivePatches(sf.random_patch_mask(batch, GRID, MASK_RATIO))
        rows = [torch.randn(patches.rows(1 << k), c) for k, c in enumerate(channels)]

        def sparse(module: nn.Module, rows: list[torch.Tensor]) -> list[torch.Tensor]:
            return module([sf.SparseTensor(x, patches, 1 << k) for k, x in enumerate(rows)])

        def dense(module: nn.Module, maps: list[torch.Tensor]) -> list[torch.Tensor]:
            return module(maps, patches.active)

        maps = [sf.SparseTensor(x, patches, 1 << k).to_dense() for k, x in enumerate(rows)]
        to_rows = lambda grad: sf.SparseTensor.from_dense(grad, patches).features  # noqa: E731
        return Run(densify, rows, sparse), Run(plain, maps, dense, to_rows)

    compare(benchmark, ceilings, runs, op="densify projection", net=model)


def compare(benchmark, ceilings, runs: Callable[[int], tuple[Run, Run]], all_dense: bool = False, **info) -> None:
    """Proves outputs and gradients equal in evaluation mode on a few images, then times training mode."""
    ours, plain = runs(FEW)
    grads = _gradients(plain)
    truth, exact = plain.results(grads, torch.float64), ours.results(grads, torch.float64)
    prove_with_kinks(info["op"], ours.results(grads, torch.float32), exact, truth)
    prove_with_kinks("dense", plain.results(grads, torch.float32), truth, truth)
    ours, plain = runs(BATCH)
    with FlopCounterMode(display=False) as counter:
        grads = _gradients(plain)
    steps = {"sparse": ours.step(grads), "dense": plain.step(grads)}
    seconds = time_in_turns(steps)
    benchmark.pedantic(steps["sparse"], rounds=1, warmup_rounds=0)
    work = Work(3 * counter.get_total_flops(), 0) if all_dense else None  # the backward pass costs two forwards
    info |= dict(kind="module", direction="all", batch=BATCH, mask_ratio=MASK_RATIO, width=WIDTH)
    note(benchmark, seconds, ceilings, work, **info)


@torch.no_grad()
def _gradients(run: Run) -> list[torch.Tensor]:
    """Random gradients of the outputs, in their memory format."""
    module = copy.deepcopy(run.module)  # whose running statistics may change
    return [torch.randn_like(output) for output in _as_list(run.call(module, run.maps))]


def _as_list(found: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return list(found) if isinstance(found, list | tuple) else [found]
