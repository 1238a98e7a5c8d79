"""Reductions: over the channels of a pixel, and over the active pixels of an image.

A reduction over space covers the active pixels of each image and gives a dense tensor; an image without any gives 0, a
softmax over space leaves masked pixels out. Reductions over the batch have no sparse meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from spark_fast.rules.pointwise import per_image_rows
from spark_fast.rules.registry import RULES, SparseOpError, name_of, named, rule, where
from spark_fast.rules.views import make, plain, spread
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
    return rows.to(torch.promote_types(rows.dtype, torch.float32))  # a sum may not fit the smaller type


def _dims(op: str, x: SparseMap, dim: int | Sequence[int] | None) -> tuple[set[int], set[str]]:
    """The dimensions to reduce: their places, and the names of those that are no channels."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        raise SparseOpError(
            f"{op}{where()} over everything mixes images of different masks; reduce x.features, or over channels or "
            "space"
        )
    places = {d % len(x.dims) for d in ((dim,) if isinstance(dim, int) else dim)}
    names = {x.dims[p] for p in places} - {"C"}
    if "X" in names or ("B" in names and names != {"B", "H", "W"}):
        raise SparseOpError(
            f"{op}{where()}: a reduction over the images of the batch has a sparse meaning with height and width only"
        )
    return places, names


class _Reduction:
    """One reduction by its three forms; each takes rows or a map in at least float32.

    Args:
        over_channels: (tensor, dims) -> tensor, keeping the dims.
        over_images: (Images, rows, channel dims) -> (B, *channels), the given channel dims kept as 1.
        partial: (zero-filled map, mask, dims) -> tensor, keeping the dims; for one of height and width.
    """

    def __init__(self, name: str, over_channels: Callable, over_images: Callable, partial: Callable):
        self.name, self.over_channels, self.over_images, self.partial = name, over_channels, over_images, partial

    def __call__(self, x: SparseMap, dim, keepdim: bool, dtype: torch.dtype | None = None):
        places, names = _dims(self.name, x, dim)
        out_dtype = dtype or x.dtype
        rows = at_least_float(x.features if dtype is None else x.features.to(dtype))
        channel_places = [p for p, name in enumerate(x.dims) if name == "C"]
        reduced = [1 + channel_places.index(p) for p in sorted(places) if x.dims[p] == "C"]  # of rows
        if not names:
            out = self.over_channels(rows, reduced).to(out_dtype)
            dims = x.dims
            if not keepdim:
                out = out.squeeze(reduced)
                dims = "".join(name for p, name in enumerate(dims) if p not in places)
            return make(out, x, dims)
        if names >= {"H", "W"}:
            images = Images(x) if "B" not in names else Batch(x)
            out = self.over_images(images, rows, reduced).to(out_dtype)  # (B or 1, *channels)
            sizes = iter(out.shape[1:])
            out = out.reshape([out.shape[0] if n == "B" else 1 if n in "HW" else next(sizes) for n in x.dims])
        else:
            mask = spread(rows.new_ones(rows.shape[0], *[1] * (rows.dim() - 1)), x.patches, x.side, x.dims) > 0
            out = self.partial(spread(rows, x.patches, x.side, x.dims), mask, sorted(places)).to(out_dtype)
        return out if keepdim else out.squeeze(sorted(places))


def _partial_mean(full, mask, dims):
    count = mask.sum(dims, keepdim=True)
    share = torch.Size(n for d, n in enumerate(full.shape) if d in dims and mask.shape[d] == 1).numel()
    return full.sum(dims, keepdim=True) / (count * share).clamp(min=1)


def _partial_amax(full, mask, dims):
    lowest = full.masked_fill(~mask, -torch.inf).amax(dims, keepdim=True)
    return torch.where(mask.any(dims, keepdim=True), lowest, 0)


def _no_partial(op: str) -> Callable:
    def refuse(full, mask, dims):
        raise SparseOpError(f"{op}{where()}: only over channels, or over both dimensions of space")

    return refuse


def _mean_rows(images: Images, rows: torch.Tensor, reduced: list[int]) -> torch.Tensor:
    return images.mean(rows.mean(reduced, keepdim=True) if reduced else rows)


def _sum_rows(images: Images, rows: torch.Tensor, reduced: list[int]) -> torch.Tensor:
    return images.sum(rows.sum(reduced, keepdim=True) if reduced else rows)


MEAN = _Reduction("mean", lambda t, d: t.mean(d, keepdim=True), _mean_rows, _partial_mean)
SUM = _Reduction(
    "sum", lambda t, d: t.sum(d, keepdim=True), _sum_rows, lambda full, mask, dims: full.sum(dims, keepdim=True)
)
AMAX = _Reduction(
    "amax",
    lambda t, d: t.amax(d, keepdim=True),
    lambda images, rows, d: images.amax(rows.amax(d, keepdim=True) if d else rows),
    _partial_amax,
)


@rule(torch.mean, torch.Tensor.mean)
def _mean(input, dim=None, keepdim=False, *, dtype=None, keepdims=False, axis=None):
    return MEAN(input, axis if dim is None else dim, keepdim or keepdims, dtype)


@rule(torch.sum, torch.Tensor.sum)
def _sum(input, dim=None, keepdim=False, *, dtype=None, keepdims=False, axis=None):
    return SUM(input, axis if dim is None else dim, keepdim or keepdims, dtype)


@rule(torch.amax, torch.Tensor.amax)
def _amax(input, dim=(), keepdim=False):
    return AMAX(input, dim, keepdim)


@rule(torch.amin, torch.Tensor.amin)
def _amin(input, dim=(), keepdim=False):
    return -AMAX(-input, dim, keepdim)


def _extreme(func: Callable, sign: int) -> Callable:
    op = name_of(func)  # not inside, where torch.compile would trace it

    def extreme(input, *args, **kwargs):
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, torch.Tensor | SparseMap):
            return (torch.maximum if sign > 0 else torch.minimum)(input, other)
        dim = args[0] if args else kwargs.get("dim")
        keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
        places, names = _dims(op, input, dim)
        if names:
            raise SparseOpError(f"{op}{where()}: indices only over channels; use amax or amin over space")
        at = 1 + [p for p, name in enumerate(input.dims) if name == "C"].index(places.pop())
        values, indices = func(input.features, at, keepdim=keepdim)
        dims = input.dims if keepdim else _without(input.dims, dim)
        return make(values, input, dims), make(indices, input, dims)

    return extreme


def _without(dims: str, dim: int) -> str:
    place = dim % len(dims)
    return dims[:place] + dims[place + 1 :]


for _function in named("max", torch, torch.Tensor):
    RULES[_function] = _extreme(_function, 1)
for _function in named("min", torch, torch.Tensor):
    RULES[_function] = _extreme(_function, -1)


def _var_mean(x: SparseMap, dim, keepdim: bool, correction: float) -> tuple:
    """In two passes; the mean is that of the same pixels."""
    places, names = _dims("var", x, dim)
    if len(names) == 1:
        _no_partial("var")(None, None, None)
    mean = MEAN(x, dim, True, torch.promote_types(x.dtype, torch.float32))
    wide = make(at_least_float(x.features), x, x.dims)
    squares = MEAN(torch.square(wide - mean), dim, True)
    channels = torch.Size(n for p, n in enumerate(x.shape) if p in places and x.dims[p] == "C").numel()
    pixels = (Batch if "B" in names else Images)(x).count if names else 1
    count = channels * pixels  # a number, or (B,)
    if isinstance(count, torch.Tensor):
        count = count.view(-1, *[1] * (squares.dim() - 1))
        scale = count / (count - correction).clamp(min=0)
    else:
        scale = count / max(count - correction, 0) if count > correction else torch.nan
    var = squares if correction == 0 else squares * scale
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
    return _var_mean(input, dim, keepdim, _correction(unbiased, correction))[0]


@rule(torch.std, torch.Tensor.std)
def _std(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, unbiased = _var_dim(dim, unbiased)
    return _var_mean(input, dim, keepdim, _correction(unbiased, correction))[0].sqrt()


@rule(torch.var_mean)
def _var_and_mean(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
    dim, unbiased = _var_dim(dim, unbiased)
    return _var_mean(input, dim, keepdim, _correction(unbiased, correction))


def _norm(x: SparseMap, p, dim, keepdim: bool, dtype=None):
    if p in (None, "fro"):
        p = 2
    x = x if dtype is None else x.to(dtype)
    if p == float("inf"):
        return AMAX(x.abs(), dim, keepdim)
    if not isinstance(p, int | float) or p <= 0:
        raise SparseOpError(f"norm{where()}: only norms of positive order; got {p!r}")
    _, names = _dims("norm", x, dim)
    if not names:  # of a pixel: PyTorch's own, whose gradient at 0 is 0
        return _Reduction("norm", lambda t, d: torch.linalg.vector_norm(t, p, d, keepdim=True), None, None)(
            x, dim, keepdim
        )
    if names == {"H", "W"} and x.patches.per_image:
        images = Images(x)
        return _Reduction("norm", None, lambda _, rows, d: images_norm(images, rows, p, d), None)(x, dim, keepdim)
    wide = make(at_least_float(x.features), x, x.dims)
    total = SUM(wide.square() if p == 2 else wide.abs() ** p, dim, keepdim)
    safe = torch.where(total > 0, total, 1)  # the root's slope at 0 is infinite
    return torch.where(total > 0, safe ** (1 / p), 0).to(x.dtype)


def images_norm(images: Images, rows: torch.Tensor, p: float, reduced: list[int]) -> torch.Tensor:
    by_image = rows.view(images.batch, images.equal, *rows.shape[1:])
    return torch.linalg.vector_norm(by_image, p, [1, *(d + 1 for d in reduced)], keepdim=True).squeeze(1)


@rule(torch.norm, torch.Tensor.norm)
def _torch_norm(input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    return _norm(input, p, dim, keepdim, dtype)


@rule(torch.linalg.vector_norm, torch.linalg.norm)
def _vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    return _norm(x, ord, dim, keepdim, dtype)


@rule(F.normalize)
def _normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    return input / _norm(input, p, dim, True).clamp(min=eps)


def _softmax(func: Callable) -> Callable:
    op = name_of(func)

    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        _, names = _dims(op, input, dim)
        if names:
            raise SparseOpError(
                f"{op}{where()}: over one dimension of space; a softmax over the active pixels is that of x.flatten(2)"
            )
        at = 1 + [p for p, name in enumerate(input.dims) if name == "C"].index(dim % len(input.dims))
        return make(func(input.features, at, dtype=dtype), input, input.dims)

    return softmax


for _function in named("softmax log_softmax"):
    RULES[_function] = _softmax(_function)


@rule(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(input, output_size):
    return _adaptive("adaptive_avg_pool2d", plain("adaptive_avg_pool2d", input), output_size, MEAN)


@rule(
    F.adaptive_max_pool2d, torch.adaptive_max_pool2d if hasattr(torch, "adaptive_max_pool2d") else F.adaptive_max_pool2d
)
def _adaptive_max_pool2d(input, output_size, return_indices=False):
    if return_indices:
        raise SparseOpError("adaptive_max_pool2d: return_indices=True has no meaning on packed rows")
    return _adaptive("adaptive_max_pool2d", plain("adaptive_max_pool2d", input), output_size, AMAX)


def _adaptive(op: str, x: SparseTensor, output_size, reduction: _Reduction) -> torch.Tensor:
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


def group_norm(x: SparseTensor, groups: int, weight, bias, eps: float) -> SparseTensor:
    """Group norm of each image's active pixels (METHOD: spatial reductions go over active pixels)."""
    channels = x.features.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: num_groups={groups} does not divide the {channels} channels")
    rows, images = at_least_float(x.features), Images(x)
    grouped = rows.unflatten(1, (groups, channels // groups))
    if images.equal:
        by_image = grouped.view(images.batch, images.equal, *grouped.shape[1:])
        var, mean = torch.var_mean(by_image, (1, 3), correction=0)  # (B, groups)
    else:
        mean = images.mean(grouped.mean(2))
        var = images.mean((grouped - per_image_rows(mean, x)[..., None]).square().mean(2))
    # As a scale and a shift for each image and channel, (B, C).
    scale = torch.rsqrt(var + eps).repeat_interleave(channels // groups, 1)
    shift = -mean.repeat_interleave(channels // groups, 1) * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    shift = shift if bias is None else shift + bias
    if images.equal:
        by_image = rows.view(images.batch, images.equal, channels)
        out = torch.addcmul(shift[:, None], by_image, scale[:, None]).flatten(0, 1)
    else:
        out = torch.addcmul(per_image_rows(shift, x), rows, per_image_rows(scale, x))
    return x.with_features(out.to(x.dtype))


@rule(F.group_norm, torch.group_norm)
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return group_norm(plain("group_norm", input), num_groups, weight, bias, eps)


@rule(F.instance_norm)
def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    x = plain("instance_norm", input)
    if not use_input_stats:
        from spark_fast.ops.norm import batch_norm

        return x.with_features(batch_norm(x.features, running_mean, running_var, weight, bias, False, momentum, eps))
    if running_mean is not None:
        with torch.no_grad():
            var, mean = _var_mean(x, (2, 3), False, 1)  # (B, C); unbiased, as PyTorch keeps it
            running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
            running_var.lerp_(var.mean(0).to(running_var.dtype), momentum)
    return group_norm(x, x.features.shape[1], weight, bias, eps)
