"""Gathers the masked patches, so that the visible 40 % cost nothing."""

from __future__ import annotations

import torch

from spark_fast.ops.densify.api import gather_patches
from spark_fast.ops.densify.library import gather, scatter
from spark_fast.ops.patch_loss.api import normalize_patches
from spark_fast.patches import ActivePatches


def forward(prediction, images, patches: ActivePatches) -> torch.Tensor:
    masked = patches.complement()
    if not masked.count:
        return prediction.sum() * 0
    size = (masked.count, images[0].numel() // masked.active[0].numel())  # (M, p * p * C)
    target, _, _ = normalize_patches(gather_patches(images, masked).view(size))
    error = gather_patches(prediction, masked).view(size) - target
    return error.square().mean(1).sum() / masked.count


def grad_prediction(grad, prediction, images, patches: ActivePatches) -> torch.Tensor:
    """For graphs, inside which autograd records nothing."""
    masked = patches.complement()
    size = (masked.count, images[0].numel() // masked.active[0].numel())
    target, _, _ = normalize_patches(gather(images, masked).view(size))
    error = gather(prediction, masked).view(size) - target
    rows = (error * (grad * 2 / max(error.numel(), 1))).view(-1, images.shape[1])
    return scatter(rows, masked, images.shape[2] // masked.grid[0], None)
