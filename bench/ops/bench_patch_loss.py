"""The reconstruction loss on masked patches, against the plain formula over all patches, masked afterwards."""

from __future__ import annotations

import pytest
import torch

import spark_fast as sf
from bench.harness import Side, Work, run_case
from bench.nets import plain_loss
from bench.settings import BATCH, GRID, MASK_RATIO, PATCH, SIZE
from spark_fast.ops.patch_loss import patch_loss


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_patch_loss(benchmark, ceilings, direction: str) -> None:
    patches = sf.ActivePatches(sf.random_patch_mask(BATCH, GRID, MASK_RATIO))
    images, prediction = (torch.randn(BATCH, 3, SIZE, SIZE) for _ in range(2))
    masked = patches.complement()

    def gather(prediction: torch.Tensor) -> torch.Tensor:
        target, guess = (_cut(t)[masked.index] for t in (images, prediction))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (guess - target).square().mean()

    def dense(prediction: torch.Tensor) -> torch.Tensor:
        return plain_loss(prediction, images, patches.active)

    one = torch.ones(())
    sides = {
        "sparse": Side(lambda p: patch_loss(p, images, patches), (prediction,), one),
        "dense": Side(dense, (prediction,), one),
        "gather": Side(gather, (prediction,), one),
    }
    values = masked.count * PATCH * PATCH * 3
    work = Work(0, 4 * values * (2 if direction == "forward" else 3))
    info = dict(kind="op", op="patch_loss", net="all", layer=f"patch loss {SIZE} px", side=PATCH, batch=BATCH)
    run_case(benchmark, ceilings, direction, sides, work, values, mask_ratio=MASK_RATIO, **info)


def _cut(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, gh, gw, values of a patch)."""
    blocks = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, gh, p, gw, p)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)
