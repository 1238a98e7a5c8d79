"""Functions that change the shape: permute, reshape, cat, stack, split, index.

Channels may be split, joined and moved at will. Height and width stay as they are, but for three things that networks
do: cut them into cells of whole pixels (space to depth), join them into one dimension (`tokens.py`), join the batch
with channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from spark_fast.rules.pointwise import common, rows_of
from spark_fast.rules.registry import RULES, SparseOpError, name_of, named, rule, where
from spark_fast.rules.tokens import Tokens
from spark_fast.rules.views import make, plain
from spark_fast.tensor import SparseMap, SparseTensor


def _permuted(x: SparseMap, places: Sequence[int]) -> SparseMap:
    """`x` with dimension places[i] at i."""
    places = [p % len(x.dims) for p in places]
    if sorted(places) != list(range(len(x.dims))):
        raise ValueError(f"permute{where()}: {places} is no order of the {len(x.dims)} dimensions of {tuple(x.shape)}")
    dims = "".join(x.dims[p] for p in places)
    channels = [p for p, name in enumerate(x.dims) if name in "CX"]
    moved = [channels.index(p) for p in places if x.dims[p] in "CX"]
    features = x.features if moved == sorted(moved) else x.features.permute(0, *(m + 1 for m in moved))
    if dims == x.dims and features is x.features:
        return x
    return make(features, x, dims)


@rule(*named("permute", torch, torch.Tensor))
def _permute(input, *dims):
    return _permuted(input, dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)


@rule(*named("transpose swapaxes swapdims transpose_", torch, torch.Tensor))
def _transpose(input, dim0, dim1):
    places = list(range(len(input.dims)))
    places[dim0], places[dim1] = places[dim1], places[dim0]
    return _permuted(input, places)


@rule(*named("movedim moveaxis", torch, torch.Tensor))
def _movedim(input, source, destination):
    source, destination = ((s,) if isinstance(s, int) else tuple(s) for s in (source, destination))
    n = len(input.dims)
    to = {d % n: s % n for s, d in zip(source, destination, strict=True)}
    rest = iter(p for p in range(n) if p not in to.values())
    return _permuted(input, [to[p] if p in to else next(rest) for p in range(n)])


@rule(torch.Tensor.contiguous)
def _contiguous(input, *args, **kwargs):
    return input


@rule(*named("view reshape", torch, torch.Tensor))
def _reshape(input, *shape):
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        raise SparseOpError(f"view{where()}: as another dtype; use x.to(dtype)")
    return reshaped(input, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)


@rule(torch.Tensor.reshape_as, torch.Tensor.view_as)
def _reshape_as(input, other):
    return reshaped(input, other.shape)


@rule(*named("flatten", torch, torch.Tensor))
def _flatten(input, start_dim=0, end_dim=-1):
    n = len(input.dims)
    start, end, shape = start_dim % n, end_dim % n, input.shape
    return reshaped(input, (*shape[:start], shape[start : end + 1].numel(), *shape[end + 1 :]))


@rule(*named("unflatten", torch, torch.Tensor))
def _unflatten(input, dim, sizes):
    shape, place = input.shape, dim % len(input.dims)
    if -1 in sizes:
        known = -torch.Size(sizes).numel()
        sizes = [shape[place] // max(known, 1) if s == -1 else s for s in sizes]
    return reshaped(input, (*shape[:place], *sizes, *shape[place + 1 :]))


@rule(*named("unsqueeze", torch, torch.Tensor))
def _unsqueeze(input, dim):
    place = dim % (len(input.dims) + 1)
    at = 1 + sum(name in "CX" for name in input.dims[:place])
    return make(input.features.unsqueeze(at), input, input.dims[:place] + "C" + input.dims[place:])


@rule(*named("squeeze", torch, torch.Tensor))
def _squeeze(input, dim=None):
    given = range(len(input.dims)) if dim is None else (dim,) if isinstance(dim, int) else dim
    shape = input.shape
    places = {d % len(input.dims) for d in given if shape[d] == 1}
    if dim is None or any(input.dims[p] != "C" for p in places):
        raise SparseOpError(f"squeeze{where()}: only channel dimensions, each by its number; got dim={dim}")
    channels = [p for p, name in enumerate(input.dims) if name in "CX"]
    features = input.features.squeeze([1 + channels.index(p) for p in places])
    return make(features, input, "".join(name for p, name in enumerate(input.dims) if p not in places))


@rule(torch.Tensor.expand)
def _expand(input, *sizes):
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if len(sizes) != len(input.dims):
        raise SparseOpError(f"expand{where()}: to more dimensions; unsqueeze first")
    shape = input.shape
    wanted = [s if w == -1 else w for w, s in zip(sizes, shape, strict=True)]
    if any(w != s for w, s, name in zip(wanted, shape, input.dims, strict=True) if name != "C"):
        raise SparseOpError(f"expand{where()}: only channels can be repeated; got {tuple(sizes)} of {tuple(shape)}")
    channels = [w for w, name in zip(wanted, input.dims, strict=True) if name == "C"]
    return make(input.features.expand(-1, *channels), input, input.dims)


@rule(torch.Tensor.expand_as)
def _expand_as(input, other):
    if not isinstance(input, SparseMap):  # a dense gate
        return input if other.dims == "BCHW" and input.dim() == 4 else input.expand(other.shape)
    return _expand(input, *other.shape)


def reshaped(x: SparseMap, shape: Sequence[int]):
    """`x` in another shape: a SparseTensor, SparseView or Tokens.

    Raises:
        ValueError: the shape has another number of elements.
        SparseOpError: masked pixels would get a meaning.
    """
    shape = list(shape)
    old, total = x.shape, x.shape.numel()
    if -1 in shape:
        known = -torch.Size(shape).numel()
        shape[shape.index(-1)] = total // known if known else 0
    if torch.Size(shape).numel() != total or (total and min(shape) < 0):
        raise ValueError(f"reshape{where()}: {tuple(old)} does not have the elements of {tuple(shape)}")
    if x.dims[-2:] == "HW" and shape == list(old[:-2]) + [old[-2] * old[-1]]:
        return Tokens.of(x)
    cells = _cells(x, shape)
    if cells is not None:
        return cells
    steps = _match(x, shape)
    if steps is None and x.patches.batch == 1 and "B" in x.dims:  # a single image's dimension goes anywhere
        first = x.dims.index("B")
        x = _permuted(x, [first, *(p for p in range(len(x.dims)) if p != first)])
        steps = _match(x, shape)
    if steps is None:
        merged = _with_space_joined(x, shape)
        if merged is not None:
            return merged
        raise SparseOpError(
            f"reshape{where()}: from {tuple(old)} ({x.dims}) to {tuple(shape)}: only channels can be split and joined, "
            "height and width joined with each other"
        )
    dims, channels = steps
    return make(x.features.reshape(x.features.shape[0], *channels), x, dims)


def _match(x: SparseMap, shape: list[int]) -> tuple[str, list[int]] | None:
    """The names of the dimensions of `shape`, and the rows' channel sizes: B, H and W match whole, runs of channels any
    sizes of the same product, the batch and its first channels become an X or come out of it. None if nothing fits."""
    old, dims = x.shape, x.dims
    names, sizes, at, j = "", [], 0, 0
    while at < len(dims):
        run = 1  # channels to find
        if dims[at] != "C":
            while shape[j : j + 1] == [1] != [old[at]]:
                names, sizes, j = names + "C", [*sizes, 1], j + 1
            if j == len(shape):
                return None
            name, whole = dims[at], shape[j] == old[at]
            if whole and name == "X":
                sizes.append(old[at] // x.patches.batch)
            elif dims[at : at + 2] == "BC" and not whole and shape[j] == old[at] * old[at + 1]:
                name, at = "X", at + 1
                sizes.append(old[at])
            elif name == "X" and shape[j] == x.patches.batch:
                name, run = "B", old[at] // x.patches.batch
            elif not whole:
                return None
            names, at, j = names + name, at + 1, j + 1
        while dims[at : at + 1] == "C":
            run, at = run * old[at], at + 1
        product = 1
        while product < run or run == 0 != product:
            if j == len(shape):
                return None
            product, names, sizes, j = product * shape[j], names + "C", [*sizes, shape[j]], j + 1
        if product != run:
            return None
    if any(n != 1 for n in shape[j:]):
        return None
    return names + "C" * (len(shape) - j), sizes + [1] * (len(shape) - j)


def _with_space_joined(x: SparseMap, shape: list[int]):
    """Where height and width become one dimension and channels are split or joined too: first the channels."""
    at = x.dims.find("HW")
    if at < 0:
        return None
    space = x.shape[at] * x.shape[at + 1]
    for j, size in enumerate(shape):
        if size == space:
            apart = shape[:j] + list(x.shape[at : at + 2]) + shape[j + 1 :]
            found = _match(x, apart)
            if found is not None and found[0].find("HW") == j:
                return Tokens.of(make(x.features.reshape(x.features.shape[0], *found[1]), x, found[0]))
    return None


def _cells(x: SparseMap, shape: list[int]):
    """Height and width cut into cells, as in view(B, C, H // s, s, W // s, s), and the reverse of it."""
    if x.dims == "BCHW" and len(shape) == 6:
        batch, channels, height, width = x.shape
        s = shape[3]
        if s > 1 and shape == [batch, channels, height // s, s, width // s, s] and x.side % s == 0:
            rows = _cut(x, s)  # (N / s^2, C, s, s)
            return make(rows, x, "BCHCWC", x.side // s)
    if x.dims in ("BCHCWC", "BHCWCC") and len(shape) == 4:
        if x.dims == "BCHCWC":
            channels, s, t = x.features.shape[1:]
            joined = [x.shape[0], channels, x.shape[2] * s, x.shape[4] * t]
            features = x.features
        else:
            s, t, channels = x.features.shape[1:]
            joined = [x.shape[0], x.shape[1] * s, x.shape[3] * t, channels]
            features = x.features.permute(0, 3, 1, 2)
        if s == t > 1 and shape == joined:
            return SparseTensor(_joined(features, x.side), x.patches, x.side * s, x.dims != "BCHCWC")
    return None


def _cut(x: SparseTensor, s: int) -> torch.Tensor:
    """The s x s pixels of each cell: rows (N / s^2, C, s, s) of maps with an s-th of the side."""
    small = x.side // s
    rows = x.features.unflatten(0, (-1, small, s, small, s)) if x.features.shape[0] else x.features
    if not x.features.shape[0]:
        return x.features.reshape(0, x.features.shape[1], s, s)
    return rows.permute(0, 1, 3, 5, 2, 4).flatten(0, 2)


def _joined(rows: torch.Tensor, side: int) -> torch.Tensor:
    """The reverse: rows (N, C, s, s) at `side` -> (N s^2, C) at side * s."""
    count, channels = rows.shape[:2]
    if not count:
        return rows.reshape(0, channels)
    return rows.unflatten(0, (-1, side, side)).permute(0, 1, 4, 2, 5, 3).reshape(-1, channels)


@rule(F.pixel_unshuffle, torch.pixel_unshuffle)
def _pixel_unshuffle(input, downscale_factor):
    x = plain("pixel_unshuffle", input)
    if x.side % downscale_factor:
        raise SparseOpError(
            f"pixel_unshuffle{where()}: the patch's side of {x.side} pixels is no multiple of {downscale_factor}; "
            "use a larger patch_size"
        )
    return SparseTensor(_cut(x, downscale_factor).flatten(1), x.patches, x.side // downscale_factor)


@rule(F.pixel_shuffle, torch.pixel_shuffle)
def _pixel_shuffle(input, upscale_factor):
    x, s = plain("pixel_shuffle", input), upscale_factor
    rows = x.features.unflatten(1, (-1, s, s))
    return SparseTensor(_joined(rows, x.side), x.patches, x.side * s)


@rule(F.channel_shuffle, torch.channel_shuffle)
def _channel_shuffle(input, groups):
    x = plain("channel_shuffle", input)
    return x.with_features(x.features.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1))


def _channel(op: str, x: SparseMap, dim: int) -> int:
    """The place among the rows' dimensions of channel dimension `dim`."""
    place = dim % len(x.dims)
    if x.dims[place] != "C":
        raise SparseOpError(
            f"{op}{where()}: only channels; got dim={dim}, which is {x.dims[place]} of {tuple(x.shape)} ({x.dims})"
        )
    return 1 + sum(name in "CX" for name in x.dims[:place])


@rule(*named("cat concat concatenate", torch))
def _cat(tensors, dim=0, out=None):
    like = common(torch.cat, tuple(tensors))
    at, place = _channel("cat", like, dim), dim % len(like.dims)
    rows = [_whole_rows(t, like, place) for t in tensors]
    return make(torch.cat(rows, dim=at), like, like.dims)


def _whole_rows(value: SparseMap | torch.Tensor, like: SparseMap, place: int) -> torch.Tensor:
    """The rows of a map or of a dense tensor that has the shape of `like`, but for the dimension at `place`."""
    if isinstance(value, SparseMap):
        return value.features
    sizes = [list(shape) for shape in (value.shape, like.shape)]
    if len(sizes[0]) == len(sizes[1]):
        sizes[0][place] = sizes[1][place]
    if sizes[0] != sizes[1]:
        raise ValueError(f"cat{where()}: shapes {tuple(value.shape)} and {tuple(like.shape)} along dimension {place}")
    rows = rows_of(value, like)
    return rows.expand(like.features.shape[0], *rows.shape[1:])


@rule(torch.stack)
def _stack(tensors, dim=0, out=None):
    if not all(isinstance(t, SparseMap) for t in tensors):
        raise SparseOpError(f"stack{where()}: sparse and dense tensors together; use SparseTensor.from_dense first")
    common(torch.stack, tuple(tensors))
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


def _pieces(function: Callable) -> Callable:
    name = name_of(function)  # not inside, where torch.compile would trace it

    def split(input, size, dim=0):
        at = _channel(name, input, dim)
        return tuple(make(piece, input, input.dims) for piece in function(input.features, size, dim=at))

    return split


for _function in named("split chunk tensor_split split_with_sizes", torch, torch.Tensor):
    RULES[_function] = _pieces(_function)


@rule(*named("unbind", torch, torch.Tensor))
def _unbind(input, dim=0):
    at, place = _channel("unbind", input, dim), dim % len(input.dims)
    dims = input.dims[:place] + input.dims[place + 1 :]
    return tuple(make(piece, input, dims) for piece in input.features.unbind(at))


@rule(*named("index_select", torch, torch.Tensor))
def _index_select(input, dim, index):
    return make(input.features.index_select(_channel("index_select", input, dim), index), input, input.dims)


@rule(*named("narrow", torch, torch.Tensor))
def _narrow(input, dim, start, length):
    return make(input.features.narrow(_channel("narrow", input, dim), start, length), input, input.dims)


@rule(*named("repeat_interleave", torch, torch.Tensor))
def _repeat_interleave(input, repeats, dim=None, output_size=None):
    at = _channel("repeat_interleave", input, 0 if dim is None else dim)
    return make(input.features.repeat_interleave(repeats, at, output_size=output_size), input, input.dims)


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
            channels.append(i)
            dims += "" if isinstance(i, int) else "C"
        elif i != slice(None):
            raise SparseOpError(
                f"indexing{where()}: {name} by {i}; only channels, as x[:, a:b], and every s-th pixel of height and "
                "width, as x[..., a::s, b::s], have a sparse meaning"
            )
        else:
            dims += name
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


def _sampled(x: SparseTensor, index: tuple) -> SparseTensor | None:
    """x[:, :, a::s, b::s]: one pixel of each cell."""
    rows, columns = index[2:]
    if not all(isinstance(i, slice) and i.stop is None and (i.step or 1) > 1 for i in (rows, columns)):
        return None
    s, first = rows.step, (rows.start or 0, columns.start or 0)
    if columns.step != s or x.side % s or not all(0 <= f < s for f in first):
        return None
    return SparseTensor(_cut(x, s)[:, :, first[0], first[1]], x.patches, x.side // s)


@rule(torch.Tensor.requires_grad_)
def _requires_grad_(input, requires_grad=True):
    input.features.requires_grad_(requires_grad)
    return input


@rule(torch.Tensor.type_as)
def _type_as(input, other):
    return input.to(other.dtype)


@rule(torch.Tensor.to)
def _to(input, *args, memory_format=None, **kwargs):  # rows have one memory format
    if not args and not kwargs:
        return input
    features = input.features.to(*args, **kwargs)
    if features.device != input.patches.device:
        raise SparseOpError("moving a SparseTensor to another device: move the images and the mask, and build it there")
    return make(features, input, input.dims)
