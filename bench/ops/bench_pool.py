"""The 3x3/2 max pooling of ResNet's stem."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bench.gather import tile_index, tiles, untile
from bench.harness import Side, Work, run_case
from bench.layers import Layer, Problem
from spark_fast.ops.pool import max_pool2d


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_max_pool(benchmark, ceilings, direction: str) -> None:
    problem = Problem(Layer("resnet", 16, 64, 64, stride=2))
    layer, patches = problem.layer, problem.patches
    index = tile_index(patches, layer.side, 3, 2, 1)

    def sparse(x: torch.Tensor) -> torch.Tensor:
        return max_pool2d(x, patches, layer.side, 3, 2, 1)[0]

    def gather(x: torch.Tensor) -> torch.Tensor:
        return untile(F.max_pool2d(tiles(x, index, outside=-math.inf), 3, 2))

    sides = {
        "sparse": Side(sparse, (problem.x,), problem.grad),
        "dense": Side(
            lambda x: F.max_pool2d(x, 3, 2, 1), (problem.dense(problem.x),), problem.dense(problem.grad), problem.rows
        ),
        "gather": Side(gather, (problem.x,), problem.grad),
    }
    work = Work(0, 4 * (problem.x.numel() + problem.grad.numel()))
    info = dict(problem.info(), layer=f"max pool 3x3/2 side{layer.side}-{layer.channels}")
    run_case(benchmark, ceilings, direction, sides, work, 1, kind="op", op="pool", **info)
