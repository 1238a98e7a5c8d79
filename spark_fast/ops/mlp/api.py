"""Pointwise MLP of each active pixel: linear, exact GELU, linear, as in a ConvNeXt block."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.mlp import graph
from spark_fast.ops.mlp.gradients import gradients, keeps


def mlp(
    features: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
) -> torch.Tensor:
    """linear(gelu(linear(features, weight1, bias1)), weight2, bias2) with the exact GELU, x times the normal
    distribution function.

    For a gradient, only what goes into the GELU and the features are kept, and only if they are needed for it: what
    comes out of the GELU is computed again.

    Args:
        features: (N, C) rows, float16/bfloat16/float32/float64. Sums are kept in at least float32.
        weight1: (H, C), weight2: (K, H), the features' dtype (any floating dtype under torch.autocast).
        bias1: (H,), bias2: (K,); None for none.

    Returns:
        rows (N, K), the features' dtype.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    tensors = checks.autocast(features, weight1, bias1, weight2, bias2)
    check_mlp(*tensors)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if torch.compiler.is_compiling():
        return graph.mlp(*tensors, wanted)
    features = tensors[0]
    return MlpFunction.apply(*tensors, wanted, backend.select("mlp", features.device, features.dtype, features))


class MlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight1, bias1, weight2, bias2, wanted, run):
        out, hidden = run.forward(features, weight1, bias1, weight2, bias2, any(wanted[:4]))
        ctx.save_for_backward(*keeps(features, hidden, weight1, weight2, wanted))
        ctx.wanted, ctx.run = wanted, run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *gradients(ctx.run, grad.contiguous(), ctx.saved_tensors, ctx.wanted), None, None


def check_mlp(features, weight1, bias1, weight2, bias2) -> None:
    if features.dim() != 2:
        raise ValueError(f"mlp: features must be (rows, channels); got shape {tuple(features.shape)}")
    if features.dtype not in checks.FLOATS:
        raise TypeError(f"mlp: features must be floating point; got {features.dtype}")
    if weight1.dim() != 2 or weight1.shape[1] != features.shape[1]:
        raise ValueError(
            f"mlp: weight1 must be (hidden, channels) for features of {features.shape[1]} channels; got shape "
            f"{tuple(weight1.shape)}"
        )
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0]:
        raise ValueError(
            f"mlp: weight2 must be (out, hidden) for a weight1 of {weight1.shape[0]} hidden channels; got shape "
            f"{tuple(weight2.shape)}"
        )
    checks.check_like("mlp", "weight1", weight1, features, None)
    checks.check_like("mlp", "bias1", bias1, features, (weight1.shape[0],))
    checks.check_like("mlp", "weight2", weight2, features, None)
    checks.check_like("mlp", "bias2", bias2, features, (weight2.shape[0],))
