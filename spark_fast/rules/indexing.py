"""Indexing: channels at will, and every s-th pixel of height and width."""

from __future__ import annotations

import operator

import torch

from spark_fast.rules.pointwise import common, rows_of
from spark_fast.rules.registry import SparseOpError, rule, where
from spark_fast.rules.shapes import cut
from spark_fast.rules.views import make
from spark_fast.tensor import SparseMap, SparseTensor


@rule(torch.Tensor.__getitem__)
def _getitem(input, index):
    index = _full_index(input, index)
    if isinstance(input, SparseTensor) and not input.channels_last:
        sampled = _sampled(input, index)
        if sampled is not None:
            return _getitem(sampled, (slice(None), index[1], slice(None), slice(None)))
    channels, dims = _of_channels(input, index)
    return make(input.features[(slice(None), *channels)], input, dims)


def _full_index(x: SparseMap, index) -> tuple:
    """An index for each dimension."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        place = next(n for n, i in enumerate(index) if i is Ellipsis)
        missing = len(x.dims) + 1 - sum(i is not None for i in index)
        index = index[:place] + (slice(None),) * missing + index[place + 1 :]
    if len(index) > len(x.dims) or any(i is None for i in index):
        raise SparseOpError(f"indexing{where()}: {index} of {tuple(x.shape)}; use unsqueeze for new dimensions")
    return index + (slice(None),) * (len(x.dims) - len(index))


def _of_channels(x: SparseMap, index: tuple) -> tuple[list, str]:
    """The part of an index for the channels, and the dimensions that remain."""
    channels, dims = [], ""
    for name, i in zip(x.dims, index, strict=True):
        if name == "C":
            channels.append(_channel_index(i))
            dims += "" if isinstance(channels[-1], int) else "C"
        elif not isinstance(i, slice) or i != slice(None):
            raise SparseOpError(
                f"indexing{where()}: {name} by {i}; only channels, as x[:, a:b], and every s-th pixel of height and "
                "width, as x[..., a::s, b::s], have a sparse meaning"
            )
        else:
            channels += [i] if name == "X" else []
            dims += name
    if sum(not isinstance(i, int | slice) for i in channels) > 1:
        raise SparseOpError(f"indexing{where()}: {index} of {tuple(x.shape)}; one dimension by a list at a time")
    return channels, dims


@rule(torch.Tensor.__setitem__)
def _setitem(input, index, value):
    if isinstance(index, SparseMap):  # of conditions
        common(torch.Tensor.__setitem__, (input, index))
        if isinstance(value, SparseMap | torch.Tensor) and value.dim():
            raise SparseOpError(f"x[condition] = value{where()}: one number only; use torch.where for others")
        input.features[index.features] = value
        return
    channels, dims = _of_channels(input, _full_index(input, index))
    place = (slice(None), *channels)
    part = make(input.features[place], input, dims)
    if isinstance(value, SparseMap):
        common(torch.Tensor.__setitem__, (part, value))
    input.features[place] = rows_of(value, part)


def _channel_index(index):
    """An index of one dimension of channels: a number, a slice, or numbers or flags in one dimension."""
    if isinstance(index, slice):
        return index
    if not isinstance(index, bool) and hasattr(type(index), "__index__") and getattr(index, "ndim", 0) == 0:
        return operator.index(index)
    if not isinstance(index, bool) and torch.as_tensor(index).dim() == 1:
        return index
    raise SparseOpError(
        f"indexing{where()}: channels by {index!r}; use numbers, slices, or one list of numbers or flags"
    )


def _sampled(x: SparseTensor, index: tuple) -> SparseTensor | None:
    """x[:, :, a::s, b::s]: one pixel of each cell."""
    rows, columns = index[2:]
    if index[0] != slice(None):
        return None
    if not all(isinstance(i, slice) and i.stop is None and (i.step or 1) > 1 for i in (rows, columns)):
        return None
    s, first = rows.step, (rows.start or 0, columns.start or 0)
    if columns.step != s or x.side % s or not all(0 <= f < s for f in first):
        return None
    return SparseTensor(cut(x, s)[:, :, first[0], first[1]], x.patches, x.side // s)
