"""Batch norm (training), layer norm and group norm on rows, forward and backward (input, weight and bias together).

The dense batch and group norms cover the whole zero-filled map: other numbers, less to compute than masked statistics,
so that they are only timed; the truth is the norm over the active pixels.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Side, Work, run_case
from bench.layers import Layer, Problem
from spark_fast.ops.group_norm import group_norm
from spark_fast.ops.norm import batch_norm, layer_norm

BATCH_NORM = [("resnet", 16, 64), ("resnet", 8, 64), ("resnet", 8, 256), ("resnet", 2, 1024)]
LAYER_NORM = [("convnext", 8, 96), ("convnext", 4, 192), ("convnext", 2, 384), ("convnext", 1, 768)]
GROUP_NORM = [("resnetv2", 8, 256, 32), ("resnetv2", 1, 2048, 32), ("unet", 16, 32, 32)]
DIRECTIONS = ("forward", "backward")


def _problem(net: str, side: int, channels: int) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    problem = Problem(Layer(net, side, channels, channels, kernel=1))
    channels = problem.layer.channels
    return problem, 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)


def _measure(benchmark, ceilings, problem: Problem, op: str, direction: str, sides: dict, truth: Side | None) -> None:
    layer, numbers = problem.layer, problem.x.numel()
    info = dict(kind="op", op=op, net=layer.net, layer=f"{op} norm side{layer.side}-{layer.channels}", side=layer.side)
    info |= dict(channels=layer.channels, batch=problem.patches.batch, mask_ratio=layer.mask_ratio)
    work = Work(0, 4 * numbers * (2 if direction == "forward" else 3))
    terms = problem.x.shape[0]
    run_case(benchmark, ceilings, direction, sides, work, terms, truth, rows_in=terms, rows_out=terms, **info)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("net", "side", "channels"), BATCH_NORM)
def test_batch_norm(benchmark, ceilings, net: str, side: int, channels: int, direction: str) -> None:
    problem, weight, bias = _problem(net, side, channels)
    x, grad = problem.x, problem.grad

    def sparse(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return batch_norm(x, None, None, w, b, training=True)

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, w, b, training=True)

    def formula(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * w + b

    sides = {
        "sparse": Side(sparse, (x, weight, bias), grad),
        "dense": Side(plain, (problem.dense(x), weight, bias), problem.dense(grad)),
        "gather": Side(plain, (x, weight, bias), grad),
    }
    truth = Side(formula, (x.double(), weight.double(), bias.double()), grad.double())
    _measure(benchmark, ceilings, problem, "batch", direction, sides, truth)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("net", "side", "channels"), LAYER_NORM)
def test_layer_norm(benchmark, ceilings, net: str, side: int, channels: int, direction: str) -> None:
    problem, weight, bias = _problem(net, side, channels)
    x, grad = problem.x, problem.grad

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), w, b)

    def rows(map_: torch.Tensor) -> torch.Tensor:
        return problem.rows(map_.permute(0, 3, 1, 2))

    maps = (problem.dense(x).permute(0, 2, 3, 1), problem.dense(grad).permute(0, 2, 3, 1))
    sides = {
        "sparse": Side(lambda x, w, b: layer_norm(x, w, b), (x, weight, bias), grad),
        "dense": Side(plain, (maps[0], weight, bias), maps[1], rows),
        "gather": Side(plain, (x, weight, bias), grad),
    }
    truth = Side(plain, (x.double(), weight.double(), bias.double()), grad.double())
    _measure(benchmark, ceilings, problem, "layer", direction, sides, truth)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("net", "side", "channels", "groups"), GROUP_NORM)
def test_group_norm(benchmark, ceilings, net: str, side: int, channels: int, groups: int, direction: str) -> None:
    problem, weight, bias = _problem(net, side, channels)
    x, grad, patches = problem.x, problem.grad, problem.patches
    groups = min(groups, x.shape[1])

    def sparse(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return group_norm(x, patches, side, groups, w, b)

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, groups, w, b)

    def by_image(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        images = x.view(patches.batch, -1, x.shape[1]).transpose(1, 2)
        return plain(images, w, b).transpose(1, 2).reshape(x.shape)

    maps = {"dense": (problem.dense(x), problem.dense(grad))}
    maps["dense channels first"] = tuple(m.contiguous() for m in maps["dense"])
    sides = {
        "sparse": Side(sparse, (x, weight, bias), grad),
        **{name: Side(plain, (map_, weight, bias), to) for name, (map_, to) in maps.items()},
        "gather": Side(by_image, (x, weight, bias), grad),
    }
    truth = Side(by_image, (x.double(), weight.double(), bias.double()), grad.double())
    _measure(benchmark, ceilings, problem, "group", direction, sides, truth)
