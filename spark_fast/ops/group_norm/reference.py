"""The formulas, image by image, in at least float32."""

from __future__ import annotations

from itertools import pairwise

import torch

from spark_fast.ops.group_norm.images import patch_starts


def forward(features, weight, bias, groups, eps, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, and the mean and the reciprocal deviation (B, groups) that they were normalised with; 0 and 1 without
    pixels."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    mean, rstd = x.new_zeros(patches.batch, groups), x.new_ones(patches.batch, groups)
    normal = torch.empty_like(x)
    for image, rows in _images(x, patches, side):
        grouped = x[rows].view(-1, groups, x.shape[1] // groups)
        var, mean[image] = torch.var_mean(grouped, (0, 2), correction=0)
        rstd[image] = 1 / torch.sqrt(var + eps)
        normal[rows] = _normal(x[rows], mean[image], rstd[image])
    out = normal if weight is None else normal * weight
    out = out if bias is None else out + bias
    return out.to(features.dtype), mean, rstd


def backward(grad, features, weight, mean, rstd, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the features, the weight and the bias."""
    x, grad = features.to(mean.dtype), grad.to(mean.dtype)
    groups = mean.shape[1]
    inner = grad if weight is None else grad * weight
    normal, out = torch.empty_like(x), torch.empty_like(x)
    for image, rows in _images(x, patches, side):
        normal[rows] = _normal(x[rows], mean[image], rstd[image])
        n, g = (t[rows].view(-1, groups, x.shape[1] // groups) for t in (normal, inner))
        centred = g - g.mean((0, 2), keepdim=True) - n * (g * n).mean((0, 2), keepdim=True)
        out[rows] = (centred * rstd[image, :, None]).flatten(1)
    return out.to(features.dtype), (grad * normal).sum(0), grad.sum(0)


def _images(x, patches, side):
    """The images that have values, and their rows."""
    starts = (patch_starts(patches) * side**2).tolist()
    for image, (start, end) in enumerate(pairwise(starts)):
        if x[start:end].numel():
            yield image, slice(start, end)


def _normal(rows, mean, rstd) -> torch.Tensor:
    grouped = rows.view(-1, len(mean), rows.shape[1] // len(mean))
    return ((grouped - mean[:, None]) * rstd[:, None]).flatten(1)
