"""Norms of packed rows that give dense maps around a fill value: norm, scatter and fill (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.norm import graph
from spark_fast.ops.norm.api import check_batch_norm, check_layer_norm, wanted_grads
from spark_fast.ops.norm.maps import Maps
from spark_fast.patches import ActivePatches


def batch_norm_scatter(
    features: torch.Tensor,
    patches: ActivePatches,
    side: int,
    fill: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`scatter_patches(batch_norm(features, ...), patches, side, fill)`, whose rows a GPU writes to the maps at once.

    Args:
        features: (P * side * side, C) rows of `patches`.
        fill: (C,), the features' dtype, differentiable: the masked pixels; None for zeros.
        running_mean, running_var, weight, bias, training, momentum, eps: as for `batch_norm`.

    Returns:
        (B, C, gh * side, gw * side), the features' dtype, channels-last in memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check("batch_norm_scatter", features, patches, side, fill)
    check_batch_norm("batch_norm_scatter", features, running_mean, running_var, weight, bias, training)
    settings = (bool(training), float(momentum), float(eps))
    if torch.compiler.is_compiling():
        return graph.batch_norm_scatter(
            features, running_mean, running_var, weight, bias, fill, *settings, patches, side
        )
    settings = (running_mean, running_var, *settings, None)
    maps = _maps(features, patches, side)
    return NormScatterFunction.apply(features, weight, bias, fill, maps, "batch_norm", settings, (settings[2], None))


def layer_norm_scatter(
    features: torch.Tensor,
    patches: ActivePatches,
    side: int,
    fill: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`scatter_patches(layer_norm(features, weight, bias, eps), patches, side, fill)`, whose rows a GPU writes to the
    maps at once. Other arguments, result and errors as for `batch_norm_scatter`.
    """
    _check("layer_norm_scatter", features, patches, side, fill)
    check_layer_norm("layer_norm_scatter", features, weight, bias)
    if torch.compiler.is_compiling():
        return graph.layer_norm_scatter(features, weight, bias, fill, float(eps), patches, side)
    maps = _maps(features, patches, side)
    return NormScatterFunction.apply(features, weight, bias, fill, maps, "layer_norm", (float(eps),), ())


def _check(op: str, features, patches, side, fill) -> None:
    checks.check_rows(op, features, patches, side)
    checks.check_like(op, "fill", fill, features, (features.shape[1],))


def _maps(features: torch.Tensor, patches: ActivePatches, side: int) -> Maps:
    norm = backend.select("norm", features.device, features.dtype, features)
    copies = backend.select("densify", features.device, features.dtype, features, patches, side)
    return Maps(patches, side, norm, copies)


class NormScatterFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, fill, maps: Maps, kind: str, settings: tuple, backward_settings: tuple):
        features = features.contiguous()
        dense, mean, rstd = maps.forward(kind, features, fill, weight, bias, *settings)
        ctx.save_for_backward(features, weight, bias, mean, rstd)
        ctx.maps, ctx.kind, ctx.settings = maps, kind, backward_settings
        return dense

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # checkpointing lets them be read once
        grads = wanted_grads(ctx, ctx.maps.backward(ctx.kind, grad, *saved, *ctx.settings), saved)
        grad_fill = ctx.maps.grad_fill(grad) if ctx.needs_input_grad[3] else None
        return *grads, grad_fill, None, None, None, None
