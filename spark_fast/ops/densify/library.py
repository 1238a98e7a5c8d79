"""One indexed copy each way."""

from __future__ import annotations

import torch

from spark_fast.patches import ActivePatches


def gather(images, patches: ActivePatches) -> torch.Tensor:
    gh, gw = patches.grid
    tiles = images.unflatten(2, (gh, -1)).unflatten(4, (gw, -1)).permute(0, 2, 4, 3, 5, 1)  # (B, gh, gw, side, side, C)
    rows = tiles[patches.index].contiguous()  # (P, height, width, C); a patch may be oblong
    # No view: autograd lets no view of one be changed in place.
    return rows.resize_(rows.shape[:3].numel(), images.shape[1])


def scatter(features, patches: ActivePatches, side: int, fill) -> torch.Tensor:
    (gh, gw), channels = patches.grid, features.shape[1]
    shape = (patches.batch, gh, side, gw, side, channels)
    dense = (
        features.new_zeros(shape) if fill is None else fill.expand(shape).clone(memory_format=torch.contiguous_format)
    )
    dense.transpose(2, 3)[patches.index] = features.view(patches.count, side, side, channels)
    return dense.view(patches.batch, gh * side, gw * side, channels).permute(0, 3, 1, 2)


def sum_masked(maps: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """Sum (C,) over the masked pixels of maps (B, C, gh * side, gw * side)."""
    return gather(maps, patches.complement()).sum(0)
