"""Reductions: over the channels of a pixel, and over the active pixels of an image.

A reduction over space covers the active pixels of each image and gives a dense tensor; an image without any gives 0, a
softmax over space leaves masked pixels out. Over the batch there is a sparse meaning together with space only: all
active pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from spark_fast.rules.registry import RULES, SparseOpError, name_of, named, rule, where
from spark_fast.rules.views import channel_place, make, order, place_of, plain, spread
from spark_fast.tensor import SparseMap, SparseTensor


class Images:
    """The rows of each image, for reductions over its active pixels.

    Attributes:
        count: active pixels in each image: a number where it is the same for all, else (B,) on the device.
    """

    def __init__(self, x: SparseMap):
        self.like, self.batch, area = x, x.patches.batch, x.side**2
        equal = x.patches.per_image
        self.equal = None if equal is None else equal * area
        self.count = x.patches.active.flatten(1).sum(1) * area if equal is None else self.equal

    def _image(self, rows: torch.Tensor) -> torch.Tensor:
        return self.like.patches.index[0].repeat_interleave(self.like.side**2, output_size=rows.shape[0])

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, *channels) -> (B, *channels)."""
        if self.equal is not None:
            return rows.view(self.batch, self.equal, *rows.shape[1:]).sum(1)
        total = rows.new_zeros(self.batch, *rows.shape[1:])
        return total.index_add(0, self._image(rows), rows)

    def amax(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, *channels) -> (B, *channels); 0 for an image without active pixels."""
        if self.equal:
            return rows.view(self.batch, self.equal, *rows.shape[1:]).amax(1)
        out = rows.new_zeros(self.batch, *rows.shape[1:])
        if self.equal == 0:
            return out
        image = self._image(rows).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
        return out.scatter_reduce(0, image, rows, "amax", include_self=False)

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, *channels) -> (B, *channels); 0 for an image without active pixels."""
        total = self.sum(rows)
        if isinstance(self.count, int):
            return total / max(self.count, 1)
        return total / self.count.clamp(min=1).view(-1, *[1] * (total.dim() - 1))


class Batch(Images):
    """All rows as one image, for statistics over the batch."""

    def __init__(self, x: SparseMap):
        self.like, self.batch = x, 1
        self.count = self.equal = x.features.shape[0]


def at_least_float(rows: torch.Tensor) -> torch.Tensor:
    if not rows.is_floating_point():
        return rows
    return rows.to(torch.promote_types(rows.dtype, torch.float32))  # a sum may not fit the smaller type


def dims_of(op: str, x: SparseMap, dim: int | Sequence[int] | None) -> tuple[set[int], set[str]]:
    """The dimensions to reduce: their places, and the names of those that are no channels."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        raise SparseOpError(
            f"{op}{where()} over everything mixes images of different masks; reduce x.features, or over channels or "
            "space"
        )
    given = [place_of(op, x, d) for d in ((dim,) if isinstance(dim, int) else dim)]
    places = set(given)
    if len(places) < len(given):
        raise ValueError(f"{op}{where()}: dim={dim} names a dimension twice")
    names = {x.dims[p] for p in places} - {"C"}
    if "X" in names or ("B" in names and names != {"B", "H", "W"}):
        raise SparseOpError(
            f"{op}{where()}: a reduction over the images of the batch has a sparse meaning with height and width only"
        )
    return places, names


class Reduction:
    """One reduction by its three forms; each takes rows or a map in at least float32.

    Args:
        over_channels: (tensor, dims) -> tensor, keeping the dims.
        over_images: (Images, rows, channel dims) -> (B, *channels), the given channel dims kept as 1.
        partial: (zero-filled map, mask, dims) -> tensor, keeping the dims; for one of height and width. None if that
            has no meaning.
    """

    def __init__(self, name: str, over_channels: Callable, over_images: Callable, partial: Callable | None):
        self.name, self.over_channels, self.over_images, self.partial = name, over_channels, over_images, partial

    def __call__(self, x: SparseMap, dim, keepdim: bool, dtype: torch.dtype | None = None):
        places, names = dims_of(self.name, x, dim)
        rows = x.features if dtype is None else x.features.to(dtype)
        if not rows.is_floating_point():
            if self is not SUM:
                raise SparseOpError(f"{self.name}{where()} of {x.dtype}; use x.float()")
            rows = rows.to(torch.int64)
        out_dtype = rows.dtype
        rows = at_least_float(rows)
        reduced = [channel_place(x, p) for p in sorted(places) if x.dims[p] == "C"]  # of rows
        if not names:
            out = self.over_channels(rows, reduced).to(out_dtype)
            dims = x.dims
            if not keepdim:
                out = out.squeeze(reduced)
                dims = "".join(name for p, name in enumerate(dims) if p not in places)
            return make(out, x, dims)
        if names >= {"H", "W"}:
            images = Images(x) if "B" not in names else Batch(x)
            out = _as_map(self.over_images(images, rows, reduced).to(out_dtype), x.dims)
        elif self.partial is None:
            raise SparseOpError(f"{self.name}{where()}: only over channels, or over both dimensions of space")
        else:
            mask = spread(rows.new_ones(rows.shape[0], *_joined_sizes(x)), x.patches, x.side, x.dims) > 0
            out = self.partial(spread(rows, x.patches, x.side, x.dims), mask, sorted(places)).to(out_dtype)
        return out if keepdim else out.squeeze(sorted(places))


def _joined_sizes(x: SparseMap) -> list[int]:
    """For each dimension of channels 1, or its size where it is one with the batch."""
    names = [name for name in x.dims if name in "CX"]
    return [n if name == "X" else 1 for name, n in zip(names, x.features.shape[1:], strict=True)]


def _as_map(values: torch.Tensor, dims: str) -> torch.Tensor:
    """Values (B, *channels) of images with `dims`, height and width 1."""
    apart = dims.replace("X", "BC").replace("H", "").replace("W", "")
    values = values.permute(order("B" + "C" * (values.dim() - 1), apart))
    sizes, shape = iter(values.shape), []
    for name in dims:
        shape.append(1 if name in "HW" else next(sizes) * (next(sizes) if name == "X" else 1))
    return values.reshape(shape)


def _partial_mean(full, mask, dims):
    count = mask.sum(dims, keepdim=True)
    share = torch.Size(n for d, n in enumerate(full.shape) if d in dims and mask.shape[d] == 1).numel()
    return full.sum(dims, keepdim=True) / (count * share).clamp(min=1)


def _partial_amax(full, mask, dims):
    lowest = full.masked_fill(~mask, -torch.inf).amax(dims, keepdim=True)
    return torch.where(mask.any(dims, keepdim=True), lowest, 0)


def _mean_rows(images: Images, rows: torch.Tensor, reduced: list[int]) -> torch.Tensor:
    return images.mean(rows.mean(reduced, keepdim=True) if reduced else rows)


def _sum_rows(images: Images, rows: torch.Tensor, reduced: list[int]) -> torch.Tensor:
    return images.sum(rows.sum(reduced, keepdim=True) if reduced else rows)


MEAN = Reduction("mean", lambda t, d: t.mean(d, keepdim=True), _mean_rows, _partial_mean)
SUM = Reduction(
    "sum", lambda t, d: t.sum(d, keepdim=True), _sum_rows, lambda full, mask, dims: full.sum(dims, keepdim=True)
)
AMAX = Reduction(
    "amax",
    lambda t, d: t.amax(d, keepdim=True),
    lambda images, rows, d: images.amax(rows.amax(d, keepdim=True) if d else rows),
    _partial_amax,
)


@rule(torch.mean, torch.Tensor.mean)
def _mean(input, dim=None, keepdim=False, *, dtype=None):
    return MEAN(input, dim, keepdim, dtype)


@rule(torch.sum, torch.Tensor.sum)
def _sum(input, dim=None, keepdim=False, *, dtype=None):
    return SUM(input, dim, keepdim, dtype)


@rule(torch.amax, torch.Tensor.amax)
def _amax(input, dim=(), keepdim=False):
    return AMAX(input, dim, keepdim)


@rule(torch.amin, torch.Tensor.amin)
def _amin(input, dim=(), keepdim=False):
    return -AMAX(-input, dim, keepdim)


class Extreme(NamedTuple):
    """What max and min over a dimension give."""

    values: SparseMap
    indices: SparseMap


def _extreme(func: Callable, sign: int) -> Callable:
    op = name_of(func)  # not inside, where torch.compile would trace it

    def extreme(input, *args, **kwargs):
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, torch.Tensor | SparseMap):
            return (torch.maximum if sign > 0 else torch.minimum)(input, other)
        dim = args[0] if args else kwargs.get("dim")
        keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
        places, names = dims_of(op, input, dim)
        if names:
            raise SparseOpError(f"{op}{where()}: indices only over channels; use amax or amin over space")
        (place,) = places
        values, indices = func(input.features, channel_place(input, place), keepdim=keepdim)
        dims = input.dims if keepdim else input.dims[:place] + input.dims[place + 1 :]
        return Extreme(make(values, input, dims), make(indices, input, dims))

    return extreme


for _function in named("max", torch, torch.Tensor):
    RULES[_function] = _extreme(_function, 1)
for _function in named("min", torch, torch.Tensor):
    RULES[_function] = _extreme(_function, -1)


def var_mean(x: SparseMap, dim, keepdim: bool, correction: float) -> tuple:
    """In two passes; the mean is that of the same pixels. Both are 0 for an image without any."""
    places, names = dims_of("var", x, dim)
    if len(names) == 1:
        raise SparseOpError(f"var{where()}: only over channels, or over both dimensions of space")
    mean = MEAN(x, dim, True, torch.promote_types(x.dtype, torch.float32))
    wide = make(at_least_float(x.features), x, x.dims)
    squares = MEAN(torch.square(wide - mean), dim, True)
    channels = torch.Size(n for p, n in enumerate(x.shape) if p in places and x.dims[p] == "C").numel()
    pixels = (Batch if "B" in names else Images)(x).count if names else 1
    count = channels * pixels  # a number, or (B,)
    if isinstance(count, torch.Tensor):
        count = _as_map(count.view(-1, *[1] * len(_joined_sizes(x))).expand(-1, *_joined_sizes(x)), x.dims)
        scale = torch.where(count > 0, count / (count - correction).clamp(min=0), 1).to(squares.dtype)
    elif count == 0:
        scale = 1
    else:  # as PyTorch: no degrees of freedom give inf, or nan where all is the same
        scale = count / (count - correction) if count > correction else torch.inf
    var = squares * scale
    squeeze = sorted(places, reverse=True)
    out = []
    for value in (var.to(x.dtype), mean.to(x.dtype)):
        if not keepdim:
            for place in squeeze:
                value = value.squeeze(place)
        out.append(value)
    return tuple(out)


def _correction(unbiased, correction) -> float:
    if correction is not None:
        return correction
    return 1 if unbiased is None or unbiased else 0


def _var_dim(dim, unbiased):
    """torch.var(x, unbiased) is over everything; torch.var(x, dim, unbiased) is not."""
    return (None, dim) if isinstance(dim, bool) else (dim, unbiased)


@rule(torch.var, torch.Tensor.var)
def _var(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, unbiased = _var_dim(dim, unbiased)
    return var_mean(input, dim, keepdim, _correction(unbiased, correction))[0]


@rule(torch.std, torch.Tensor.std)
def _std(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, unbiased = _var_dim(dim, unbiased)
    var = var_mean(input, dim, keepdim, _correction(unbiased, correction))[0]
    return var.with_features(_root(var.features)) if isinstance(var, SparseMap) else _root(var)


def _root(var: torch.Tensor) -> torch.Tensor:
    """The root, with no slope at 0, as PyTorch's std has none."""
    return torch.where(var == 0, var, torch.where(var == 0, 1, var).sqrt())


@rule(torch.var_mean)
def _var_and_mean(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, unbiased = _var_dim(dim, unbiased)
    return var_mean(input, dim, keepdim, _correction(unbiased, correction))


def _softmax(func: Callable) -> Callable:
    op = name_of(func)

    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        if isinstance(_stacklevel, torch.dtype):  # the third argument of torch.softmax
            dtype = _stacklevel
        places, names = dims_of(op, input, dim)
        if names:
            raise SparseOpError(
                f"{op}{where()}: over one dimension of space; a softmax over the active pixels is that of x.flatten(2)"
            )
        return make(func(input.features, channel_place(input, *places), dtype=dtype), input, input.dims)

    return softmax


for _function in named("softmax log_softmax"):
    RULES[_function] = _softmax(_function)


@rule(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(input, output_size):
    return _adaptive("adaptive_avg_pool2d", plain("adaptive_avg_pool2d", input), output_size, MEAN)


@rule(F.adaptive_max_pool2d)
def _adaptive_max_pool2d(input, output_size, return_indices=False):
    if return_indices:
        raise SparseOpError("adaptive_max_pool2d: return_indices=True has no meaning on packed rows")
    return _adaptive("adaptive_max_pool2d", plain("adaptive_max_pool2d", input), output_size, AMAX)


def _adaptive(op: str, x: SparseTensor, output_size, reduction: Reduction) -> torch.Tensor:
    """Dense (B, C, h, w): in each bin the reduction of its active pixels, 0 where it has none."""
    sizes = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    sizes = tuple(s if o is None else o for o, s in zip(sizes, x.shape[2:], strict=True))
    if sizes == (1, 1):
        return reduction(x, (2, 3), True)
    full = x.to_dense()
    mask = make(x.features.new_ones(x.features.shape[0], 1), x, x.dims).to_dense()
    if reduction is MEAN:
        share = F.adaptive_avg_pool2d(mask, sizes)
        return torch.where(share > 0, F.adaptive_avg_pool2d(full, sizes) / torch.where(share > 0, share, 1), 0)
    lowest = F.adaptive_max_pool2d(full.masked_fill(mask == 0, -torch.inf), sizes)
    return torch.where(F.adaptive_max_pool2d(mask, sizes) > 0, lowest, 0)
