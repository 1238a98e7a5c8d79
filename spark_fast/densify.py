"""Densify: sparse feature maps to dense ones, masked places filled with a learned token (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import nn

from spark_fast.decoder import DenseConv2d, is_own, running_statistics
from spark_fast.nn import SparseBatchNorm2d, SparseLayerNorm
from spark_fast.ops.conv import project
from spark_fast.ops.linear import linear
from spark_fast.ops.norm import batch_norm, batch_norm_scatter, layer_norm, layer_norm_scatter
from spark_fast.tensor import SparseTensor


class PixelProjection(nn.Conv2d):
    """nn.Conv2d with a 1x1 kernel, which also takes packed rows (N, C)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() == 2:
            return linear(input, self.weight.flatten(1), self.bias)
        return super().forward(input)


class Densify(nn.Module):
    """Norm, fill and projection of each stage; lists are ordered from the coarsest stage to the finest.

    Args:
        channels: of the stages' maps.
        widths: the decoder's widths at these stages.
        norm: "bn", "ln" or "none".

    Attributes:
        norms, projs: one module per stage.
        mask_tokens: one (1, C, 1, 1) parameter per stage.
    """

    def __init__(self, channels: list[int], widths: list[int], norm: str):
        super().__init__()
        self.norms = nn.ModuleList(_norm(norm, c) for c in channels)
        self.projs = nn.ModuleList(
            _projection(c, w, coarsest=i == 0) for i, (c, w) in enumerate(zip(channels, widths, strict=True))
        )
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, c, 1, 1)) for c in channels)
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)

    def forward(self, maps: list[SparseTensor]) -> list[torch.Tensor]:
        """Dense maps (B, width_i, H_i, W_i) from sparse ones (B, C_i, H_i, W_i), coarsest first."""
        stages = zip(maps, self.norms, self.projs, self.mask_tokens, strict=True)
        return [_dense(x, norm, proj, token.flatten()) for x, norm, proj, token in stages]


def _dense(x: SparseTensor, norm: nn.Module, proj: nn.Module, token: torch.Tensor) -> torch.Tensor:
    """proj(norm(x) filled with token (C,)); with the norm in the pass of what follows if it is what `Densify` made."""
    plain = is_own(norm, SparseLayerNorm) or (is_own(norm, SparseBatchNorm2d) and norm.momentum is not None)
    plain = plain and norm.bias is not None and not x.channels_last
    if is_own(proj, DenseConv2d):
        if not plain:
            x = norm(x)
            return project(x.features, token.to(x.dtype), x.patches, x.side, proj.weight, proj.bias)
        # norm(x) - token is the norm with another bias: no pass of its own.
        token = token.to(x.dtype)
        bias = norm.bias - token.to(norm.bias.dtype)
        return project(_rows(x, norm, bias), token, x.patches, x.side, proj.weight, proj.bias, relative=True)
    if plain and is_own(proj, nn.Identity):
        return _scattered(x, norm, token.to(x.dtype))
    x = norm(x)
    token = token.to(x.dtype)
    if is_own(proj, PixelProjection):
        return proj(x).to_dense(fill=proj(token[None])[0])
    return proj(x.to_dense(fill=token))


def _rows(x: SparseTensor, norm: nn.Module, bias: torch.Tensor) -> torch.Tensor:
    """norm(x).features with another bias than the norm's own."""
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(x.features, norm.weight, bias, norm.eps)
    running, training = running_statistics(norm)
    return batch_norm(x.features, *running, norm.weight, bias, training, norm.momentum, norm.eps)


def _scattered(x: SparseTensor, norm: nn.Module, fill: torch.Tensor) -> torch.Tensor:
    """norm(x).to_dense(fill)."""
    if isinstance(norm, nn.LayerNorm):
        return layer_norm_scatter(x.features, x.patches, x.side, fill, norm.weight, norm.bias, norm.eps)
    running, training = running_statistics(norm)
    return batch_norm_scatter(
        x.features, x.patches, x.side, fill, *running, norm.weight, norm.bias, training, norm.momentum, norm.eps
    )


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "bn":
        return SparseBatchNorm2d(channels)
    if kind == "ln":
        return SparseLayerNorm(channels, eps=1e-6)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"densify_norm must be 'auto', 'bn', 'ln' or 'none'; got {kind!r}")


def _projection(channels: int, width: int, coarsest: bool) -> nn.Module:
    if not coarsest:
        return DenseConv2d(channels, width)
    return nn.Identity() if channels == width else PixelProjection(channels, width, 1)
