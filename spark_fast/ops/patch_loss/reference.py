"""The formula, on all patches, then the masked ones."""

from __future__ import annotations

import torch

from spark_fast.ops.patch_loss.api import normalize_patches
from spark_fast.patches import ActivePatches


def forward(prediction, images, patches: ActivePatches) -> torch.Tensor:
    masked = ~patches.active
    error = _error(prediction, images, patches).square().mean(-1)  # (B, gh, gw)
    return torch.where(masked, error, 0).sum() / masked.sum().clamp(min=1)


def grad_prediction(grad, prediction, images, patches: ActivePatches) -> torch.Tensor:
    """For graphs, inside which autograd records nothing."""
    masked = ~patches.active
    error = _error(prediction, images, patches)
    values = masked.sum().clamp(min=1) * max(error.shape[-1], 1)
    found = torch.where(masked[..., None], 2 * grad / values * error, 0)
    (gh, gw), (batch, channels, height, width) = patches.grid, images.shape
    cut = found.view(batch, gh, gw, height // gh, width // gw, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)


def _error(prediction, images, patches: ActivePatches) -> torch.Tensor:
    """(B, gh, gw, values of a patch)."""
    gh, gw = patches.grid
    cut = [
        t.unflatten(2, (gh, -1)).unflatten(4, (gw, -1)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        for t in (prediction, images)
    ]
    target, _, _ = normalize_patches(cut[1])
    return cut[0] - target
