"""Group norm of packed rows with the statistics of each image's active pixels."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.group_norm import graph
from spark_fast.ops.norm.api import check_layer_norm, wanted_grads
from spark_fast.patches import ActivePatches


def group_norm(
    features: torch.Tensor,
    patches: ActivePatches,
    side: int,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Group norm of each image by itself, with mean and biased variance over its active pixels and a group's channels;
    with as many groups as channels it is instance norm.

    Args:
        features: (P * side * side, C) rows of `patches`, float16/bfloat16/float32/float64. Statistics are kept in at
            least float32. Images may have different numbers of active patches, or none.
        groups: of channels; it divides C.
        weight, bias: (C,) or None.

    Returns:
        (P * side * side, C), the features' dtype.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    checks.check_rows("group_norm", features, patches, side)
    check_layer_norm("group_norm", features, weight, bias)
    channels = features.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: groups={groups} does not divide the {channels} channels")
    settings = (groups, float(eps), patches, side)
    if torch.compiler.is_compiling():
        return graph.group_norm(features, weight, bias, *settings)
    run = backend.select("group_norm", features.device, features.dtype, features)
    return GroupNormFunction.apply(features, weight, bias, *settings, run)


class GroupNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, groups, eps, patches, side, run):
        features = features.contiguous()
        out, mean, rstd = run.forward(features, weight, bias, groups, eps, patches, side)
        ctx.save_for_backward(features, weight, bias, mean, rstd)
        ctx.patches, ctx.side, ctx.run = patches, side, run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight, bias, mean, rstd = ctx.saved_tensors  # checkpointing lets them be read once
        grads = ctx.run.backward(grad.contiguous(), features, weight, mean, rstd, ctx.patches, ctx.side)
        return *wanted_grads(ctx, grads, (features, weight, bias)), *[None] * 5
