"""Norms of packed rows that give dense maps around a fill value: norm, scatter and fill (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.norm import graph
from spark_fast.ops.norm.api import batch_statistics, check_batch_norm, check_layer_norm, wanted_grads
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
    mean, rstd = batch_statistics(features, running_mean, running_var, training, momentum, eps)
    if torch.compiler.is_compiling():
        return graph.batch_norm_scatter(features, fill, mean, rstd, weight, bias, bool(training), patches, side)
    maps = _maps(features, patches, side)
    return BatchNormScatterFunction.apply(features, fill, mean, rstd, weight, bias, bool(training), maps)


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
        return graph.layer_norm_scatter(features, fill, weight, bias, float(eps), patches, side)
    return LayerNormScatterFunction.apply(features, fill, weight, bias, float(eps), _maps(features, patches, side))


def _check(op: str, features, patches, side, fill) -> None:
    checks.check_rows(op, features, patches, side)
    checks.check_like(op, "fill", fill, features, (features.shape[1],))


def _maps(features: torch.Tensor, patches: ActivePatches, side: int) -> Maps:
    norm = backend.select("norm", features.device, features.dtype, features)
    copies = backend.select("densify", features.device, features.dtype, features, patches, side)
    return Maps(patches, side, norm, copies)


class BatchNormScatterFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, fill, mean, rstd, weight, bias, training, maps: Maps):
        features = features.contiguous()
        ctx.save_for_backward(features, mean, rstd, weight, bias)
        ctx.maps, ctx.training = maps, training
        return maps.batch_norm(features, fill, mean, rstd, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # checkpointing lets them be read once
        features, _, _, weight, bias = saved
        of_features, of_weight, of_bias = ctx.maps.batch_norm_backward(grad, *saved, ctx.training)
        grads = (of_features, _grad_fill(ctx, grad), None, None, of_weight, of_bias)
        return *wanted_grads(ctx, grads, (features, grad, None, None, weight, bias)), None, None


class LayerNormScatterFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, fill, weight, bias, eps, maps: Maps):
        features = features.contiguous()
        dense, mean, rstd = maps.layer_norm(features, fill, weight, bias, eps)
        ctx.save_for_backward(features, mean, rstd, weight, bias)
        ctx.maps = maps
        return dense

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        features, _, _, weight, bias = saved
        of_features, of_weight, of_bias = ctx.maps.layer_norm_backward(grad, *saved)
        grads = (of_features, _grad_fill(ctx, grad), of_weight, of_bias)
        return *wanted_grads(ctx, grads, (features, grad, weight, bias)), None, None


def _grad_fill(ctx, grad: torch.Tensor) -> torch.Tensor | None:
    return ctx.maps.grad_fill(grad) if ctx.needs_input_grad[1] else None
