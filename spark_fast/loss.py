"""The reconstruction loss, and its inverse view: from normalised predictions back to pixels."""

from __future__ import annotations

import torch

from spark_fast.ops.densify import gather_patches, scatter_patches
from spark_fast.ops.patch_loss import normalize_patches, patch_loss
from spark_fast.patches import ActivePatches

__all__ = ["fill_masked", "patch_loss"]


def fill_masked(prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """`images` with the masked patches replaced by the prediction, scaled back by each patch's own mean and deviation.

    Args:
        prediction, images: (B, C, H, W).
        patches: the *active* patches.

    Returns:
        (B, C, H, W); visible pixels are those of `images`.
    """
    masked = patches.complement()
    side, channels = images.shape[2] // patches.grid[0], images.shape[1]
    size = (masked.count, side * side * channels)
    _, mean, root = normalize_patches(gather_patches(images, masked).view(size))
    pixels = gather_patches(prediction.to(images.dtype), masked).view(size) * root + mean
    filled = scatter_patches(pixels.view(-1, channels), masked, side)
    visible = scatter_patches(gather_patches(images, patches), patches, side)
    return filled + visible
