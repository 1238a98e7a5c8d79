"""Depthwise submanifold 2D convolution on packed rows; called by conv2d when groups = channels."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend
from spark_fast.ops.depthwise import graph
from spark_fast.ops.window import Geometry


def depthwise_conv2d(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """Each channel convolved with its own kernel; semantics and checks as in `spark_fast.ops.conv.conv2d`.

    Args:
        features: (geometry.rows_in, C).
        weight: (C, 1, kh, kw), the features' dtype.
        bias: (C,) or None.
        geometry: patches, window and sides.

    Returns:
        rows (geometry.rows_out, C).
    """
    if torch.compiler.is_compiling():
        return graph.depthwise_conv2d(features, weight, bias, geometry)
    run = backend.select("depthwise", features.device, features.dtype, features, weight, geometry)
    return DepthwiseFunction.apply(features, weight, bias, geometry, run)


def trial(run, features, weight, geometry: Geometry) -> None:
    """All that a training step asks of a backend, for `backend.select` to measure."""
    out = run.forward(features, weight, None, geometry)
    run.grad_input(out, weight, geometry)
    run.grad_weight(out, features, geometry, weight)


class DepthwiseFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, geometry: Geometry, run):
        ctx.save_for_backward(features, weight)
        ctx.geometry, ctx.run = geometry, run
        return run.forward(features, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = ctx.run.grad_input(grad, weight, ctx.geometry)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.run.grad_weight(grad, features, ctx.geometry, weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, grad_bias, None, None
