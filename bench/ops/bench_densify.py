"""Between dense maps and rows: gather of the active patches, scatter with a mask token, and after a layer norm.

Dense: what the dense network does instead, a multiplication by the mask and a fill. Gather: plain indexing.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import spark_fast as sf
from bench.harness import Side, Work, run_case
from bench.layers import Layer, Problem
from spark_fast.ops.norm import layer_norm_scatter

IMAGES, MAPS = ("resnet", 32, 3), [("resnet", 8, 256), ("resnet", 4, 512), ("resnet", 2, 1024), ("resnet", 1, 2048)]


NORMS = [("convnext", 8, 96), ("convnext", 1, 768)]


def _measure(benchmark, ceilings, problem: Problem, op: str, direction: str, sides: dict, size: int, **more) -> None:
    layer = problem.layer
    info = dict(problem.info(), layer=f"{op} side{layer.side}-{layer.channels}")
    work = Work(0, 4 * size)
    terms = problem.patches.batch * problem.patches.grid[0] * problem.patches.grid[1] * layer.side**2
    run_case(benchmark, ceilings, direction, sides, work, terms, kind="op", op="densify", **info, **more)


def _patches_first(maps: torch.Tensor, side: int) -> torch.Tensor:
    """A view (B, gh, gw, side, side, C) of maps (B, C, H, W)."""
    return maps.permute(0, 2, 3, 1).unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3)


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
@pytest.mark.parametrize(("net", "side", "channels"), [IMAGES, MAPS[0]])
def test_from_dense(benchmark, ceilings, net: str, side: int, channels: int, direction: str) -> None:
    problem = Problem(Layer(net, side, channels, channels, kernel=1))
    patches, side = problem.patches, problem.layer.side
    maps = torch.randn(problem.dense(problem.x).shape)
    maps = maps if channels == 3 else maps.to(memory_format=torch.channels_last)  # images come as (B, 3, H, W)
    mask = F.interpolate(patches.active[:, None].float(), scale_factor=side)

    def plain(maps: torch.Tensor) -> torch.Tensor:
        return _patches_first(maps, side)[patches.index].reshape(-1, maps.shape[1])

    def masked(map_: torch.Tensor) -> torch.Tensor:
        return problem.rows(map_) if map_.dim() == 4 else map_

    grad = problem.grad
    sides = {
        "sparse": Side(lambda m: sf.SparseTensor.from_dense(m, patches).features, (maps,), grad, masked),
        "dense": Side(lambda m: m * mask, (maps,), problem.dense(grad), masked),
        "gather": Side(plain, (maps,), grad, masked),
    }
    _measure(benchmark, ceilings, problem, "from dense", direction, sides, 2 * problem.x.numel())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("net", "side", "channels"), MAPS)
def test_to_dense(benchmark, ceilings, net: str, side: int, channels: int, direction: str) -> None:
    problem = Problem(Layer(net, side, channels, channels, kernel=1))
    patches, side, x = problem.patches, problem.layer.side, problem.x
    token = torch.randn(problem.layer.channels)
    mask = F.interpolate(patches.active[:, None].float(), scale_factor=side)
    grad = torch.randn(problem.dense(x).shape).to(memory_format=torch.channels_last)

    def fill(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return torch.where(mask.bool(), x, token.view(1, -1, 1, 1))

    def plain(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        batch, (gh, gw) = patches.batch, patches.grid
        blocks = token.expand(batch, gh, gw, side, side, len(token)).index_put(
            patches.index, x.view(-1, side, side, len(token))
        )
        return blocks.transpose(2, 3).reshape(batch, gh * side, gw * side, len(token)).permute(0, 3, 1, 2)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return problem.rows(t) if direction == "backward" and t.dim() == 4 else t

    sides = {
        "sparse": Side(
            lambda x, t: sf.SparseTensor(x, patches, side).to_dense(fill=t), (x, token), grad, rows
        ),
        "dense": Side(fill, (problem.dense(x), token), grad, rows),
        "gather": Side(plain, (x, token), grad, rows),
    }  # fmt: skip
    _measure(benchmark, ceilings, problem, "to dense", direction, sides, x.numel() + grad.numel())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("net", "side", "channels"), NORMS)
def test_layer_norm_to_dense(benchmark, ceilings, net: str, side: int, channels: int, direction: str) -> None:
    """What `Densify` runs at the coarsest stage where it projects nothing."""
    problem = Problem(Layer(net, side, channels, channels, kernel=1))
    patches, side, x, channels = problem.patches, problem.layer.side, problem.x, problem.layer.channels
    token, weight, bias = torch.randn(channels), 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)
    mask = F.interpolate(patches.active[:, None].float(), scale_factor=side).bool()
    grad = torch.randn(problem.dense(x).shape).to(memory_format=torch.channels_last)

    def sparse(x: torch.Tensor, token: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return layer_norm_scatter(x, patches, side, token, w, b)

    def dense(maps: torch.Tensor, token: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pixels = F.layer_norm(maps.permute(0, 2, 3, 1), (channels,), w, b)
        return torch.where(mask, pixels.permute(0, 3, 1, 2), token.view(1, -1, 1, 1))

    def plain(x: torch.Tensor, token: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows = F.layer_norm(x, (channels,), w, b).view(-1, side, side, channels)
        blocks = token.expand(patches.batch, *patches.grid, side, side, channels).index_put(patches.index, rows)
        return blocks.transpose(2, 3).flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return problem.rows(t) if direction == "backward" and t.dim() == 4 else t

    rest = (token, weight, bias)
    sides = {
        "sparse": Side(sparse, (x, *rest), grad, rows),
        "dense": Side(dense, (problem.dense(x), *rest), grad, rows),
        "gather": Side(plain, (x, *rest), grad, rows),
    }
    size = (x.numel() if direction == "forward" else 2 * x.numel()) + grad.numel()
    _measure(benchmark, ceilings, problem, "layer norm to dense", direction, sides, size)
