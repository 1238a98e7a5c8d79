"""What plain PyTorch can do with packed rows: gather each patch with its halo into a tile, dense ops on the tiles."""

from __future__ import annotations

import torch

from spark_fast.patches import ActivePatches


def tile_index(patches: ActivePatches, side: int, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Rows of each patch's tile, int64 (P, T, T): the input pixels that the patch's outputs read.

    The number of rows stands for a masked pixel, one more for a pixel beyond the image border.
    """
    length = (side // stride - 1) * stride + kernel
    image, row, col = patches.index
    offsets = torch.arange(length) - padding
    y, x = row[:, None] * side + offsets, col[:, None] * side + offsets  # (P, T)
    (gh, gw), rows = patches.grid, patches.rows(side)
    inside = ((y >= 0) & (y < gh * side))[:, :, None] & ((x >= 0) & (x < gw * side))[:, None]
    y, x = y.clamp(0, gh * side - 1), x.clamp(0, gw * side - 1)
    patch = patches.grid_to_patch[image[:, None, None], (y // side)[:, :, None], (x // side)[:, None]].long()
    found = patch * side * side + (y % side)[:, :, None] * side + (x % side)[:, None]
    found = torch.where(patch < 0, rows, found)
    return torch.where(inside, found, rows + 1)


def tiles(rows: torch.Tensor, index: torch.Tensor, outside: float = 0.0) -> torch.Tensor:
    """(P, C, T, T), channels-last in memory; masked pixels are 0, those beyond the border `outside`."""
    border = rows.new_zeros(2, rows.shape[1])
    border[1] = outside
    flat = torch.cat((rows, border)).index_select(0, index.flatten())
    return flat.view(*index.shape, -1).permute(0, 3, 1, 2)


def untile(maps: torch.Tensor) -> torch.Tensor:
    """(P, C, side, side) -> rows (P * side * side, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
