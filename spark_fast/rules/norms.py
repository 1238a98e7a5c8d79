"""Norms as numbers, and normalization by the statistics of an image's active pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spark_fast.ops.group_norm import group_norm
from spark_fast.ops.norm import batch_norm
from spark_fast.rules.reductions import AMAX, SUM, Images, Reduction, at_least_float, dims_of, var_mean
from spark_fast.rules.registry import SparseOpError, no_out, rule, where
from spark_fast.rules.views import make, plain
from spark_fast.tensor import SparseMap, SparseTensor


def _norm(x: SparseMap, p, dim, keepdim: bool, dtype=None):
    if p in (None, "fro"):
        p = 2
    x = x if dtype is None else x.to(dtype)
    if p == float("inf"):
        return AMAX(x.abs(), dim, keepdim)
    if not isinstance(p, int | float) or p <= 0:
        raise SparseOpError(f"norm{where()}: only norms of positive order; got {p!r}")
    _, names = dims_of("norm", x, dim)
    if not names:  # of a pixel: PyTorch's own, whose gradient at 0 is 0
        return Reduction("norm", lambda t, d: torch.linalg.vector_norm(t, p, d, keepdim=True), None, None)(
            x, dim, keepdim
        )
    if names == {"H", "W"} and x.patches.per_image:
        images = Images(x)
        return Reduction("norm", None, lambda _, rows, d: images_norm(images, rows, p, d), None)(x, dim, keepdim)
    wide = make(at_least_float(x.features), x, x.dims)
    total = SUM(wide.square() if p == 2 else wide.abs() ** p, dim, keepdim)
    safe = torch.where(total > 0, total, 1)  # the root's slope at 0 is infinite
    return torch.where(total > 0, safe ** (1 / p), 0).to(x.dtype)


def images_norm(images: Images, rows: torch.Tensor, p: float, reduced: list[int]) -> torch.Tensor:
    by_image = rows.view(images.batch, images.equal, *rows.shape[1:])
    return torch.linalg.vector_norm(by_image, p, [1, *(d + 1 for d in reduced)], keepdim=True).squeeze(1)


@rule(torch.norm, torch.Tensor.norm)
def _torch_norm(input, p="fro", dim=None, keepdim=False, out=None, dtype=None):
    no_out("norm", out)
    return _norm(input, p, dim, keepdim, dtype)


@rule(torch.linalg.vector_norm)
def _vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None, out=None):
    no_out("vector_norm", out)
    return _norm(x, ord, dim, keepdim, dtype)


@rule(torch.linalg.norm)
def _linalg_norm(A, ord=None, dim=None, keepdim=False, *, dtype=None, out=None):
    no_out("norm", out)
    if ord not in (None, "fro") and not isinstance(dim, int) and len(dim or ()) != 1:
        raise SparseOpError(
            f"linalg.norm{where()}: ord={ord!r} over two dimensions is that of a matrix; use vector_norm"
        )
    return _norm(A, ord, dim, keepdim, dtype)


@rule(F.normalize)
def _normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    no_out("normalize", out)
    return input / _norm(input, p, dim, True).clamp(min=eps)


def _update_running(x: SparseTensor, running_mean, running_var, momentum: float) -> None:
    """Towards the means over the images of their statistics, the variance unbiased; an image of fewer than two pixels
    has none."""
    count = Images(x).count
    var, mean = var_mean(x, (2, 3), False, 1)  # (B, C)
    if isinstance(count, int):
        if count < 2:
            raise ValueError(f"instance_norm: running statistics need two active pixels in an image; got {count}")
        new = mean.mean(0), var.mean(0)
    else:
        known = (count > 1)[:, None]  # (B, 1)
        images = known.sum()
        new = (torch.where(known, v, 0).sum(0) / images.clamp(min=1) for v in (mean, var))
        momentum = momentum * (images > 0)
    for running, value in zip((running_mean, running_var), new, strict=True):
        running.lerp_(value.to(running.dtype), torch.as_tensor(momentum, device=running.device, dtype=running.dtype))


@rule(F.group_norm, torch.group_norm)
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    x = plain("group_norm", input)
    return x.with_features(group_norm(x.features, x.patches, x.side, num_groups, weight, bias, eps))


@rule(F.instance_norm)
def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    x = plain("instance_norm", input)
    if not use_input_stats:
        return x.with_features(batch_norm(x.features, running_mean, running_var, weight, bias, False, momentum, eps))
    if running_mean is not None:
        with torch.no_grad():
            _update_running(x, running_mean, running_var, momentum)
    return x.with_features(group_norm(x.features, x.patches, x.side, x.features.shape[1], weight, bias, eps))
