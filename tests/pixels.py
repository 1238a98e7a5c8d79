"""Random pixels in random order, their zero-filled maps, and the active set of a window's output, made by hand."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

SHAPE = (3, 11, 13)


def points(density: float, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Tensor:
    """Coordinates (N, 3) of random pixels in random order; images have different numbers of them, one has none."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(shape, generator=generator) < density
    if shape[0] > 1:
        active[1] = False
    coords = active.nonzero()
    return coords[torch.randperm(len(coords), generator=generator)]


def dense_of(features: Tensor, coords: Tensor, shape: tuple[int, int, int]) -> Tensor:
    batch, height, width = shape
    dense = features.new_zeros(batch, height, width, features.shape[1])
    return dense.index_put(tuple(coords.T), features).permute(0, 3, 1, 2)


def picked(dense: Tensor, coords: Tensor) -> Tensor:
    return dense.permute(0, 2, 3, 1)[tuple(coords.long().T)]


def set_by_hand(coords: Tensor, layer: dict, size: tuple[int, int], output: str) -> set[tuple[int, ...]]:
    """The active output pixels, pixel by pixel and tap by tap."""
    kernel, stride, padding, dilation = (layer[name] for name in ("kernel", "stride", "padding", "dilation"))
    active = {tuple(c) for c in coords.tolist()}
    if output == "mask":
        cells = {(b, y // stride, x // stride) for b, y, x in active}
        return {(b, y, x) for b, y, x in cells if y < size[0] and x < size[1]}
    images = range(int(coords[:, 0].max()) + 1 if len(coords) else 0)
    taps = list(itertools.product(range(kernel), repeat=2))
    return {
        (b, y, x)
        for b, y, x in itertools.product(images, range(size[0]), range(size[1]))
        if any((b, y * stride - padding + i * dilation, x * stride - padding + j * dilation) in active for i, j in taps)
    }


def at_pixels(active: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask on a map of `size`, by hand: an output pixel touches the patches that its share of the image does."""
    batch, gh, gw = active.shape
    out = torch.zeros(batch, *size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            rows = slice(y * gh // size[0], -(-(y + 1) * gh // size[0]))
            columns = slice(x * gw // size[1], -(-(x + 1) * gw // size[1]))
            out[:, y, x] = active[:, rows, columns].flatten(1).any(1)
    return out
