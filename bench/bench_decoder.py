"""The decoder, and the densify projections in front of it, forward + backward, against plain channels-last PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spark_fast as sf
from bench.harness import Work, note, prove, time_in_turns, tolerance
from bench.nets import PlainDecoder, PlainDensify, stir
from bench.settings import BATCH, GRID, MASK_RATIO, TINY

NETS = {
    "resnet50": ([2048, 1024, 512, 256], "bn"),
    "convnext_small": ([768, 384, 192, 96], "ln"),
}
WIDTH = 32 if TINY else 768


def test_decoder(benchmark, ceilings) -> None:
    decoder = stir(sf.Decoder(32, WIDTH))
    plain = PlainDecoder(decoder).to(memory_format=torch.channels_last)
    maps = [_random(WIDTH >> k, 1 << k) for k in range(4)]
    compare(benchmark, ceilings, decoder, plain, maps, maps, kind="module", op="decoder", net="all", width=WIDTH)


@pytest.mark.parametrize("model", list(NETS))
def test_densify(benchmark, ceilings, model: str) -> None:
    """All four stages: norm, fill with the mask token, projection."""
    channels, norm = NETS[model]
    channels = [max(8, c // 32) for c in channels] if TINY else channels
    densify = stir(sf.Densify(channels, [WIDTH >> k for k in range(4)], norm))
    plain = PlainDensify(densify).to(memory_format=torch.channels_last)
    active = sf.random_patch_mask(BATCH, GRID, MASK_RATIO)
    patches = sf.ActivePatches(active)
    rows = [torch.randn(patches.rows(1 << k), c) for k, c in enumerate(channels)]
    dense = [sf.SparseTensor(x, patches, 1 << k).to_dense() for k, x in enumerate(rows)]

    def sparse(rows: list[torch.Tensor], module: nn.Module) -> list[torch.Tensor]:
        return module([sf.SparseTensor(x, patches, 1 << k) for k, x in enumerate(rows)])

    compare(
        benchmark, ceilings, densify, plain, rows, dense, sparse, lambda maps, module: module(maps, active),
        to_rows=lambda map_: sf.SparseTensor.from_dense(map_, patches).features,
        kind="module", op="densify projection", net=model, width=WIDTH,
    )  # fmt: skip


def _random(channels: int, side: int) -> torch.Tensor:
    height, width = GRID[0] * side, GRID[1] * side
    return torch.randn(BATCH, channels, height, width).to(memory_format=torch.channels_last)


def _plain_call(maps: list[torch.Tensor], module: nn.Module):
    return module(maps)


def compare(
    benchmark, ceilings, ours: nn.Module, plain: nn.Module, our_maps: list, maps: list,
    call: Callable = _plain_call, plain_call: Callable = _plain_call, to_rows: Callable | None = None, **info,
) -> None:  # fmt: skip
    """Proves outputs and all gradients equal in evaluation mode, then times forward + backward in training mode."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = _as_list(plain_call(maps, copy.deepcopy(plain)))
    grads = [torch.randn_like(o) for o in outputs]  # keeps channels-last

    def step(module: nn.Module, inputs: list, run: Callable) -> Callable[[], list[torch.Tensor]]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        wanted = leaves + list(module.parameters())

        def forward_backward() -> list[torch.Tensor]:
            found = _as_list(run(leaves, module))
            return found + list(torch.autograd.grad(found, wanted, grads))

        return forward_backward

    results = []
    for module, inputs, run in ((ours, our_maps, call), (plain, maps, plain_call)):
        found = step(copy.deepcopy(module).eval(), inputs, run)()
        if to_rows and module is plain:
            n = len(grads)
            found[n : n + len(maps)] = [to_rows(g) for g in found[n : n + len(maps)]]
        results.append([t.detach().double().flatten() for t in found])
    prove(info["op"], *results, bound=tolerance(1e6))
    runs = {"sparse": step(ours.train(), our_maps, call), "dense": step(plain.train(), maps, plain_call)}
    seconds = time_in_turns(runs)
    benchmark.pedantic(runs["sparse"], rounds=1, warmup_rounds=0)
    work = Work(3 * counter.get_total_flops(), 0) if to_rows is None else None  # the backward pass costs two forwards
    note(benchmark, seconds, ceilings, work, batch=BATCH, mask_ratio=MASK_RATIO, direction="all", **info)


def _as_list(found: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return list(found) if isinstance(found, list | tuple) else [found]
