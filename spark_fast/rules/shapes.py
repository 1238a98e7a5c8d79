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
from spark_fast.rules.registry import RULES, SparseOpError, name_of, named, no_out, rule, where
from spark_fast.rules.tokens import Tokens
from spark_fast.rules.views import channel_place, listed, make, place_of, plain
from spark_fast.tensor import SparseMap, SparseTensor


def _permuted(x: SparseMap, places: Sequence[int]) -> SparseMap:
    """`x` with dimension places[i] at i."""
    places = [place_of("permute", x, p) for p in places]
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
def _permute(input, *numbers, dims=None):
    return _permuted(input, listed(numbers, dims))


@rule(*named("transpose swapaxes swapdims", torch, torch.Tensor))
def _transpose(input, dim0, dim1):
    places = list(range(len(input.dims)))
    dim0, dim1 = place_of("transpose", input, dim0), place_of("transpose", input, dim1)
    places[dim0], places[dim1] = places[dim1], places[dim0]
    return _permuted(input, places)


@rule(*named("movedim moveaxis", torch, torch.Tensor))
def _movedim(input, source, destination):
    source, destination = ((s,) if isinstance(s, int) else tuple(s) for s in (source, destination))
    n = len(input.dims)
    source, destination = ([place_of("movedim", input, d) for d in side] for side in (source, destination))
    to = dict(zip(destination, source, strict=True))
    rest = iter(p for p in range(n) if p not in to.values())
    return _permuted(input, [to[p] if p in to else next(rest) for p in range(n)])


@rule(torch.Tensor.contiguous)
def _contiguous(input, memory_format=torch.contiguous_format):
    """A copy, as PyTorch makes one of what was permuted: operations in place on it leave `input` as it is."""
    return make(input.features.clone(memory_format=torch.contiguous_format), input, input.dims)


@rule(*named("view reshape", torch, torch.Tensor))
def _reshape(input, *numbers, shape=None, size=None, dtype=None):
    if dtype is not None or (len(numbers) == 1 and isinstance(numbers[0], torch.dtype)):
        raise SparseOpError(f"view{where()}: as another dtype; use x.to(dtype)")
    return reshaped(input, listed(numbers, size if shape is None else shape))


@rule(torch.Tensor.reshape_as, torch.Tensor.view_as)
def _reshape_as(input, other):
    return reshaped(input, other.shape)


@rule(*named("flatten", torch, torch.Tensor))
def _flatten(input, start_dim=0, end_dim=-1):
    start, end, shape = (*(place_of("flatten", input, d) for d in (start_dim, end_dim)), input.shape)
    if start > end:
        raise ValueError(f"flatten{where()}: start_dim={start_dim} comes after end_dim={end_dim}")
    names = input.dims[start : end + 1]
    if names == "HW":
        return Tokens.of(input)
    if not names.strip("C"):
        at = channel_place(input, start)
        features = input.features.flatten(at, at + len(names) - 1)
        return make(features, input, input.dims[:start] + "C" + input.dims[end + 1 :])
    return reshaped(input, (*shape[:start], shape[start : end + 1].numel(), *shape[end + 1 :]))


@rule(*named("unflatten", torch, torch.Tensor))
def _unflatten(input, dim, sizes):
    shape, place = input.shape, place_of("unflatten", input, dim)
    if input.dims[place] == "C":
        features = input.features.unflatten(channel_place(input, place), sizes)
        return make(features, input, input.dims[:place] + "C" * len(sizes) + input.dims[place + 1 :])
    if -1 in sizes:
        known = -torch.Size(sizes).numel()
        sizes = [shape[place] // max(known, 1) if s == -1 else s for s in sizes]
    return reshaped(input, (*shape[:place], *sizes, *shape[place + 1 :]))


@rule(*named("unsqueeze", torch, torch.Tensor))
def _unsqueeze(input, dim):
    n = len(input.dims)
    if not -n - 1 <= dim <= n:
        raise IndexError(f"unsqueeze{where()}: dim={dim} of {tuple(input.shape)}")
    place = dim % (n + 1)
    return make(
        input.features.unsqueeze(channel_place(input, place)), input, input.dims[:place] + "C" + input.dims[place:]
    )


@rule(*named("squeeze", torch, torch.Tensor))
def _squeeze(input, dim=None):
    given = range(len(input.dims)) if dim is None else (dim,) if isinstance(dim, int) else dim
    shape = input.shape
    places = {place_of("squeeze", input, d) for d in given if shape[d] == 1}
    if dim is None or any(input.dims[p] != "C" for p in places):
        raise SparseOpError(f"squeeze{where()}: only channel dimensions, each by its number; got dim={dim}")
    features = input.features.squeeze([channel_place(input, p) for p in places])
    return make(features, input, "".join(name for p, name in enumerate(input.dims) if p not in places))


@rule(torch.Tensor.expand)
def _expand(input, *sizes, size=None):
    sizes = listed(sizes, size)
    if len(sizes) != len(input.dims):
        raise SparseOpError(f"expand{where()}: to more dimensions; unsqueeze first")
    shape = input.shape
    wanted = [s if w == -1 else w for w, s in zip(sizes, shape, strict=True)]
    if any(w != s for w, s, name in zip(wanted, shape, input.dims, strict=True) if name != "C"):
        raise SparseOpError(f"expand{where()}: only channels can be repeated; got {tuple(sizes)} of {tuple(shape)}")
    channels = [w if name == "C" else -1 for w, name in zip(wanted, input.dims, strict=True) if name in "CX"]
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
    if torch.Size(shape).numel() != total or min(shape, default=1) < 0:
        raise ValueError(f"reshape{where()}: {tuple(old)} does not have the elements of {tuple(shape)}")
    cells = _cells(x, shape)
    if cells is not None:
        return cells
    steps = _match(x, shape)
    if steps is None and x.patches.batch == 1 and "B" in x.dims:  # a single image's dimension goes anywhere
        first = x.dims.index("B")
        x = _permuted(x, [first, *(p for p in range(len(x.dims)) if p != first)])
        steps = _match(x, shape)
    if steps is None and x.dims[-2:] == "HW" and shape == list(old[:-2]) + [old[-2] * old[-1]]:
        return Tokens.of(x)
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
            while shape[j : j + 1] == [1] and _is_channel(x, at, len(shape) - j):
                names, sizes, j = names + "C", [*sizes, 1], j + 1
            if j == len(shape):
                return None
            name, whole = dims[at], shape[j] == old[at]
            if whole and name == "X":
                sizes.append(old[at] // x.patches.batch)
            elif dims[at : at + 2] == "BC" and not whole and _joins(shape[j], old[at], old[at + 1]):
                name, joined = "X", shape[j] // old[at]
                sizes.append(joined)
                at, run = at + 1, old[at + 1] // joined
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


def _is_channel(x: SparseMap, at: int, left: int) -> bool:
    """Is a size of 1 before dimension `at`, one of `left` sizes, a channel's?"""
    if x.dims[at] == "X" and x.patches.batch == 1:
        return False  # it is the image
    spare = "C" not in x.dims[at:] and left > len(x.dims) - at  # more of them than a map of 1x1 pixels needs
    return x.shape[at] != 1 or spare


def _joins(size: int, batch: int, channels: int) -> bool:
    """Is `size` the batch with the channels, or with a part of them before the others?"""
    return batch > 0 and size > 0 and size % batch == 0 and channels % (size // batch) == 0


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
            rows = cut(x, s)  # (N / s^2, C, s, s)
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


def cut(x: SparseTensor, s: int) -> torch.Tensor:
    """The s x s pixels of each cell: rows (N / s^2, C, s, s) of maps with an s-th of the side."""
    small = x.side // s
    rows = x.features.unflatten(0, (x.patches.count, small, s, small, s))
    return rows.permute(0, 1, 3, 5, 2, 4).flatten(0, 2)


def _joined(rows: torch.Tensor, side: int) -> torch.Tensor:
    """The reverse: rows (N, C, s, s) at `side` -> (N s^2, C) at side * s."""
    count, channels, s, t = rows.shape
    cells = rows.unflatten(0, (count // side**2, side, side))
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(count * s * t, channels)


@rule(F.pixel_unshuffle, torch.pixel_unshuffle)
def _pixel_unshuffle(input, downscale_factor):
    x = plain("pixel_unshuffle", input)
    if downscale_factor < 1 or x.side % downscale_factor:
        raise SparseOpError(
            f"pixel_unshuffle{where()}: the patch's side of {x.side} pixels is no multiple of {downscale_factor}; "
            "use a larger patch_size"
        )
    return SparseTensor(cut(x, downscale_factor).flatten(1), x.patches, x.side // downscale_factor)


@rule(F.pixel_shuffle, torch.pixel_shuffle)
def _pixel_shuffle(input, upscale_factor):
    x, s = plain("pixel_shuffle", input), upscale_factor
    channels = x.features.shape[1]
    if s < 1 or channels % s**2:
        raise ValueError(f"pixel_shuffle{where()}: {channels} channels are no multiple of upscale_factor^2, {s}^2")
    rows = x.features.unflatten(1, (channels // s**2, s, s))
    return SparseTensor(_joined(rows, x.side), x.patches, x.side * s)


@rule(F.channel_shuffle, torch.channel_shuffle)
def _channel_shuffle(input, groups):
    x = plain("channel_shuffle", input)
    return x.with_features(x.features.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1))


def _channel(op: str, x: SparseMap, dim: int) -> int:
    """The place among the rows' dimensions of channel dimension `dim`."""
    place = place_of(op, x, dim)
    if x.dims[place] != "C":
        raise SparseOpError(
            f"{op}{where()}: only channels; got dim={dim}, which is {x.dims[place]} of {tuple(x.shape)} ({x.dims})"
        )
    return channel_place(x, place)


@rule(*named("cat concat concatenate", torch))
def _cat(tensors, dim=0, *, out=None):
    no_out("cat", out)
    like = common(torch.cat, tuple(tensors))
    at, place = _channel("cat", like, dim), place_of("cat", like, dim)
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
def _stack(tensors, dim=0, *, out=None):
    no_out("stack", out)
    if not all(isinstance(t, SparseMap) for t in tensors):
        raise SparseOpError(f"stack{where()}: sparse and dense tensors together; use SparseTensor.from_dense first")
    common(torch.stack, tuple(tensors))
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


def _pieces(function: Callable) -> Callable:
    name = name_of(function)  # not inside, where torch.compile would trace it

    def split(input, *args, dim=0, **size):
        """The second argument has a name of its own in each of the functions: chunks, split_size, ..."""
        (size, *dims) = (*args, *size.values())
        at = _channel(name, input, dims[0] if dims else dim)
        return tuple(make(piece, input, input.dims) for piece in function(input.features, size, dim=at))

    return split


for _function in named("split chunk tensor_split split_with_sizes", torch, torch.Tensor):
    RULES[_function] = _pieces(_function)


@rule(*named("unbind", torch, torch.Tensor))
def _unbind(input, dim=0):
    at, place = _channel("unbind", input, dim), place_of("unbind", input, dim)
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
    if dim is None:
        raise SparseOpError(f"repeat_interleave{where()}: dim=None flattens the map; name a dimension of channels")
    at = _channel("repeat_interleave", input, dim)
    return make(input.features.repeat_interleave(repeats, at, output_size=output_size), input, input.dims)


@rule(torch.Tensor.requires_grad_)
def _requires_grad_(input, requires_grad=True):
    input.features.requires_grad_(requires_grad)
    return input


@rule(torch.Tensor.type_as)
def _type_as(input, other):
    return input.to(other.dtype)


@rule(torch.Tensor.to)
def _to(input, *args, memory_format=None, **kwargs):  # rows have one memory format
    args = [a.features if isinstance(a, SparseMap) else a for a in args]
    kwargs = {name: a.features if isinstance(a, SparseMap) else a for name, a in kwargs.items()}
    if not isinstance(input, SparseMap):  # a dense tensor in the dtype of a sparse one
        return input.to(*args, memory_format=memory_format, **kwargs)
    if not args and not kwargs:
        return input
    features = input.features.to(*args, **kwargs)
    if features.device != input.patches.device:
        raise SparseOpError("moving a SparseTensor to another device: move the images and the mask, and build it there")
    return make(features, input, input.dims)
