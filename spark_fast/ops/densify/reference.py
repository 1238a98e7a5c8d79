"""The meaning, patch by patch."""

from __future__ import annotations

import torch

from spark_fast.patches import ActivePatches


def gather(images, patches: ActivePatches) -> torch.Tensor:
    side = images.shape[2] // patches.grid[0]
    rows = [
        images[image, :, row * side : (row + 1) * side, col * side : (col + 1) * side].flatten(1).t()
        for image, row, col in patches.coords.tolist()
    ]
    nothing = images.flatten(2)[0, :, :0].t()  # (0, C), so that an empty result still has a gradient
    return torch.cat((nothing, *rows))


def scatter(features, patches: ActivePatches, side: int, fill) -> torch.Tensor:
    channels = features.shape[1]
    shape = (patches.batch, channels, patches.grid[0] * side, patches.grid[1] * side)
    start = features.new_zeros(shape) if fill is None else fill.view(1, -1, 1, 1).expand(shape).clone()
    out = start.contiguous(memory_format=torch.channels_last)
    for (image, row, col), patch in zip(patches.coords.tolist(), features.split(side * side), strict=False):
        out[image, :, row * side : (row + 1) * side, col * side : (col + 1) * side] = patch.t().unflatten(
            1, (side, side)
        )
    return out
