"""Gathers the masked patches, so that the visible 40 % cost nothing."""

from __future__ import annotations

import torch

from spark_fast.ops.densify.api import gather_patches
from spark_fast.ops.patch_loss.api import normalize_patches
from spark_fast.patches import ActivePatches


def forward(prediction, images, patches: ActivePatches) -> torch.Tensor:
    masked = patches.complement()
    count = max(masked.count, 1)
    target, _, _ = normalize_patches(gather_patches(images, masked).view(masked.count, -1))  # (M, p * p * C)
    error = gather_patches(prediction, masked).view(masked.count, -1) - target
    return error.square().mean(1).sum() / count
