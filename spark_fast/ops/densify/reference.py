"""The meaning, patch by patch."""

from __future__ import annotations

import torch

from spark_fast.patches import ActivePatches


def gather(images, patches: ActivePatches) -> torch.Tensor:
    height, width = images.shape[2] // patches.grid[0], images.shape[3] // patches.grid[1]
    rows = [
        images[image, :, row * height : (row + 1) * height, col * width : (col + 1) * width].flatten(1).t()
        for image, row, col in patches.coords.tolist()
    ]
    nothing = images.permute(0, 2, 3, 1).flatten(0, 2)[:0]  # (0, C), so that an empty result still has a gradient
    return torch.cat((nothing, *rows))


def scatter(features, patches: ActivePatches, side: int | tuple[int, int], fill) -> torch.Tensor:
    channels, (height, width) = features.shape[1], (side, side) if isinstance(side, int) else side
    shape = (patches.batch, channels, patches.grid[0] * height, patches.grid[1] * width)
    start = features.new_zeros(shape) if fill is None else fill.view(1, -1, 1, 1).expand(shape).clone()
    out = start.contiguous(memory_format=torch.channels_last)
    for (image, row, col), patch in zip(patches.coords.tolist(), features.split(height * width), strict=False):
        pixels = patch.t().unflatten(1, (height, width))
        out[image, :, row * height : (row + 1) * height, col * width : (col + 1) * width] = pixels
    return out


def sum_masked(maps: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """Sum (C,) over the masked pixels of maps (B, C, gh * side, gw * side)."""
    return gather(maps, patches.complement()).sum(0)
