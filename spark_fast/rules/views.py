"""SparseView: a sparse map whose channels are several dimensions, or stand elsewhere than in a SparseTensor.

It is what `x.view(B, groups, C // groups, H, W)`, `torch.stack` or `x.sum(1)` give on a SparseTensor. All of it is
internal to a module: as soon as the dimensions are (B, C, H, W) or (B, H, W, C) again the result is a SparseTensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spark_fast.ops.densify import scatter_patches
from spark_fast.patches import ActivePatches
from spark_fast.rules.registry import SparseOpError, where
from spark_fast.tensor import SparseMap, SparseTensor


class SparseView(SparseMap):
    """Rows (N, *channels) whose dimensions are `dims`, for example "BCCHW".

    Besides B, H, W and C there may be an X in place of the B: the batch and the first channel dimension as one, as in
    `x.reshape(1, B * C, H, W)`.
    """

    __slots__ = ("dims",)

    def __init__(self, features: torch.Tensor, patches: ActivePatches, side: int, dims: str):
        self.features, self.patches, self.side, self.dims = features, patches, side, dims
        self.fusion = None

    @property
    def shape(self) -> torch.Size:
        gh, gw = self.patches.grid
        sizes = {"B": self.patches.batch, "H": gh * self.side, "W": gw * self.side}
        channels = iter(self.features.shape[1:])
        joined = {"C": 1, "X": self.patches.batch}
        return torch.Size(sizes[d] if d in sizes else joined[d] * next(channels) for d in self.dims)

    def to_dense(self) -> torch.Tensor:
        """The zero-filled dense batch in the shape of this view."""
        return spread(self.features, self.patches, self.side, self.dims)

    def with_features(self, features: torch.Tensor) -> SparseTensor | SparseView:
        return make(features, self, self.dims)

    def __repr__(self) -> str:
        return f"SparseView(shape={tuple(self.shape)}, dims={self.dims}, patches={self.patches})"


def make(features: torch.Tensor, like: SparseMap, dims: str, side: int | None = None) -> SparseTensor | SparseView:
    """Rows (N, *channels) on the patches of `like`, as the simplest kind that has these dimensions."""
    side = like.side if side is None else side
    if features.dim() != 1 + sum(name in "CX" for name in dims):
        raise SparseOpError(f"a sparse map{where()} of dimensions {dims} cannot have rows {tuple(features.shape)}")
    if dims in ("BCHW", "BHWC") and features.is_floating_point():
        out = SparseTensor(features, like.patches, side, dims == "BHWC")
    else:
        out = SparseView(features, like.patches, side, dims)
    out.fusion = like.fusion
    return out


def spread(rows: torch.Tensor, patches: ActivePatches, side: int, dims: str) -> torch.Tensor:
    """Rows (N, *channels) as a zero-filled dense batch with `dims`; False-filled, where they are conditions."""
    channels = rows.shape[1:]
    flat = rows.reshape(rows.shape[0], channels.numel())
    (gh, gw), batch = patches.grid, patches.batch
    height, width = gh * side, gw * side
    if rows.is_floating_point():
        dense = scatter_patches(flat, patches, side)
    else:
        dense = flat.new_zeros(batch, height, width, flat.shape[1])
        dense[patches.pixel_coords(side).long().unbind(1)] = flat
        dense = dense.permute(0, 3, 1, 2)
    dense = dense.reshape(batch, *channels, height, width)
    natural, apart = "B" + "C" * len(channels) + "HW", dims.replace("X", "BC")
    return dense.permute(order(natural, apart)).reshape(SparseView(rows, patches, side, dims).shape)


def place_of(op: str, x: SparseMap, dim: int) -> int:
    """The place of dimension `dim`, which may be negative.

    Raises:
        IndexError: there is none.
    """
    n = len(x.dims)
    if not -n <= dim < n:
        raise IndexError(f"{op}{where()}: dim={dim} of {tuple(x.shape)}, which has dimensions {-n} to {n - 1}")
    return dim % n


def channel_place(x: SparseMap, place: int) -> int:
    """The place among the rows' dimensions of the channel dimension at `place`."""
    return 1 + sum(name in "CX" for name in x.dims[:place])


def listed(numbers: tuple, named: Sequence[int] | None) -> Sequence[int]:
    """What a method got as f(2, 3), f((2, 3)) or f(name=(2, 3))."""
    if named is not None:
        return named
    return numbers[0] if len(numbers) == 1 and not isinstance(numbers[0], int) else numbers


def order(given: str, wanted: str) -> list[int]:
    """The permutation from dimensions `given` to `wanted`; the C's keep their order."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(given):
        places.setdefault(name, []).append(place)
    return [places[name].pop(0) for name in wanted]


def plain(op: str, x: object, channels_last: bool = False) -> SparseTensor:
    """`x`, which `op` wants as (B, C, H, W), or as (B, H, W, C).

    Raises:
        SparseOpError: it is something else.
    """
    if isinstance(x, SparseTensor) and x.channels_last == channels_last:
        return x
    if not isinstance(x, SparseMap):
        raise SparseOpError(f"{op}{where()}: the input is a dense tensor and another argument sparse; convert one")
    if channels_last:
        raise SparseOpError(
            f"{op}{where()} acts on the last dimension, which is not the channels of {tuple(x.shape)}; "
            "use it on x.permute(0, 2, 3, 1)"
        )
    hint = "; permute(0, 3, 1, 2) the channels-last tensor first" if x.dims == "BHWC" else ""
    raise SparseOpError(f"{op}{where()} expects (B, C, H, W), got {tuple(x.shape)} with dimensions {x.dims}{hint}")
