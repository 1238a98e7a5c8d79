"""Composed of PyTorch's operations."""

from __future__ import annotations

import torch

from spark_fast.patches import ActivePatches


class Images:
    """Rows by image: (B, n, ...) where all images have n of them, else (N, ...) with the image of each."""

    def __init__(self, patches: ActivePatches, side: int):
        area = side**2
        self.batch, self.area, equal = patches.batch, area, patches.per_image
        self.equal = None if equal is None else equal * area
        if equal is None:
            self.image = patches.index[0].repeat_interleave(area, output_size=patches.rows(side))
            self.rows = patches.active.flatten(1).sum(1)[:, None] * area  # (B, 1)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.equal is None else rows.view(self.batch, self.equal, *rows.shape[1:])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, ...) of each image, for rows that are split."""
        return values[self.image] if self.equal is None else values[:, None]

    def mean(self, split: torch.Tensor) -> torch.Tensor:
        """Over the rows of each image and over the last dimension, (B, groups); 0 without values."""
        sums, width = split.sum(-1), split.shape[-1]
        if self.equal is not None:
            return sums.sum(1) / max(self.equal * width, 1)
        return sums.new_zeros(self.batch, *sums.shape[1:]).index_add(0, self.image, sums) / (self.rows * width).clamp(1)


def forward(features, weight, bias, groups, eps, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, and the mean and the reciprocal deviation (B, groups) that they were normalised with."""
    images, cut = Images(patches, side), (groups, features.shape[1] // groups)
    x = images.split(features.to(torch.promote_types(features.dtype, torch.float32))).unflatten(-1, cut)
    mean = images.mean(x)
    mean = mean + images.mean(x - images.spread(mean)[..., None])  # what a sum of many values far from 0 has lost
    away = x - images.spread(mean)[..., None]
    rstd = torch.rsqrt(images.mean(away.square()) + eps)
    out = away * images.spread(rstd)[..., None]
    out = out if weight is None else out * weight.view(cut)
    out = out if bias is None else out + bias.view(cut)
    # Detached it is no view to autograd, so that it may be written to in place.
    return out.view(features.shape).to(features.dtype).detach(), mean, rstd


def backward(grad, features, weight, mean, rstd, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the features, the weight and the bias."""
    images, groups = Images(patches, side), mean.shape[1]
    cut = (groups, features.shape[1] // groups)
    x, grad = (images.split(t.to(mean.dtype)).unflatten(-1, cut) for t in (features, grad))
    scale = images.spread(rstd)[..., None]
    normal = (x - images.spread(mean)[..., None]) * scale
    inner = grad if weight is None else grad * weight.view(cut)
    along = normal * images.spread(images.mean(inner * normal))[..., None]
    out = (inner - images.spread(images.mean(inner))[..., None] - along) * scale
    rows = features.shape
    return out.view(rows).to(features.dtype), (grad * normal).view(rows).sum(0), grad.view(rows).sum(0)
