"""Linear map of the channels of each active pixel: nn.Linear on channels-last maps, and 1x1 convolution."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.linear import graph


def linear(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """features @ weight.T + bias.

    Args:
        features: (N, C) rows, float16/bfloat16/float32/float64. Sums are kept in at least float32.
        weight: (O, C), the features' dtype (any floating dtype under torch.autocast).
        bias: (O,) or None.

    Returns:
        rows (N, O).

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    features, weight, bias = checked_linear(features, weight, bias)
    if torch.compiler.is_compiling():
        return graph.linear(features, weight, bias)
    return LinearFunction.apply(features, weight, bias, backend.select("linear", features.device, features.dtype))


def checked_linear(features, weight, bias) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The arguments of `linear`, cast as autocast wants it."""
    features, weight, bias = checks.autocast(features, weight, bias)
    if features.dim() != 2 or weight.dim() != 2 or weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"linear: features must be (rows, channels) and weight (out, channels); got {tuple(features.shape)} and "
            f"{tuple(weight.shape)}"
        )
    checks.check_like("linear", "weight", weight, features, None)
    checks.check_like("linear", "bias", bias, features, (weight.shape[0],))
    return features, weight, bias


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, run):
        ctx.save_for_backward(features, weight)
        ctx.run = run
        return run.forward(features, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = ctx.run.grad_input(grad, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.run.grad_weight(grad, features)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, grad_bias, None
