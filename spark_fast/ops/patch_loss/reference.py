"""The formula, on all patches, then the masked ones."""

from __future__ import annotations

import torch

from spark_fast.ops.patch_loss.api import normalize_patches
from spark_fast.patches import ActivePatches


def forward(prediction, images, patches: ActivePatches) -> torch.Tensor:
    gh, gw = patches.grid
    cut = [
        t.unflatten(2, (gh, -1)).unflatten(4, (gw, -1)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        for t in (prediction, images)
    ]
    target, _, _ = normalize_patches(cut[1])
    error = (cut[0] - target).square().mean(-1)  # (B, gh, gw)
    masked = ~patches.active
    return torch.where(masked, error, 0).sum() / masked.sum().clamp(min=1)
