"""Submanifold 2D convolution on packed rows."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.conv import graph
from spark_fast.ops.depthwise.api import depthwise_conv2d
from spark_fast.ops.graph import window_tables
from spark_fast.ops.linear.api import linear
from spark_fast.ops.window import Geometry, Window, padding_pair, pair
from spark_fast.patches import ActivePatches


def conv2d(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patches: ActivePatches,
    side: int,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[torch.Tensor, int]:
    """Convolution of the active pixels; inactive inputs count as 0, outputs are the active pixels of the output map.

    Equal to the dense convolution of the zero-filled map, times the mask at the output's resolution (paper, section
    3.1, "sparse convolution"; the output's active set is not dilated, and the bias acts on active outputs only).

    Args:
        features: (P * side * side, C) rows, float16/bfloat16/float32/float64. Sums are kept in at least float32.
        weight: (O, C / groups, kh, kw), the features' dtype (any floating dtype under torch.autocast).
        bias: (O,) or None.
        patches: the P active patches.
        side: a patch's side in pixels of this map.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d; padding is zeros, "same" or "valid".

    Returns:
        rows (P * side_out * side_out, O) and side_out.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    checks.check_rows("conv2d", features, patches, side)
    geometry = Geometry.of(patches, side, conv_window(weight, stride, padding, dilation), op="conv2d")
    return convolve(features, geometry, weight, bias, groups), geometry.side_out


def convolve(
    features: torch.Tensor, geometry: Geometry, weight: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1
) -> torch.Tensor:
    """The convolution of `conv2d` from the rows of `geometry.source` to those of `geometry.query`, which may be other
    patches (`spark_fast.ops.output_sets`); such a one is not traced by torch.compile.

    Args:
        features: (geometry.rows_in, C).
        weight, bias, groups: as in `conv2d`.

    Returns:
        rows (geometry.rows_out, O).

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    features, weight, bias = checks.autocast(features, weight, bias)
    channels, out_channels = features.shape[1], weight.shape[0]
    if groups < 1 or channels % groups or out_channels % groups or channels // groups != weight.shape[1]:
        raise ValueError(
            f"conv2d: weight {tuple(weight.shape)} with groups={groups} takes {weight.shape[1] * groups} channels and "
            f"gives {out_channels}; the features have {channels}"
        )
    checks.check_like("conv2d", "weight", weight, features, None)
    checks.check_like("conv2d", "bias", bias, features, (out_channels,))
    if geometry.is_pointwise and groups == 1:
        return linear(features, weight.flatten(1), bias)
    if groups == channels == out_channels and groups > 1:
        return depthwise_conv2d(features, weight, bias, geometry)
    if torch.compiler.is_compiling():
        return graph.conv2d(features, weight, bias, groups, window_tables(geometry))
    run = backend.select("conv", features.device, features.dtype, features, weight, geometry, groups)
    return Conv2dFunction.apply(features, weight, bias, geometry, groups, run)


def conv_window(weight: torch.Tensor, stride, padding, dilation) -> Window:
    """The window of `conv2d`'s arguments.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    if weight.dim() != 4:
        raise ValueError(f"conv2d: weight must be (out, in / groups, kh, kw); got shape {tuple(weight.shape)}")
    kernel = tuple(weight.shape[2:])
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if stride != (1, 1):
            raise ValueError(f"conv2d: padding='same' needs stride 1; got {stride}. Give the padding as numbers")
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return Window(kernel, stride, (reach[0] // 2, reach[1] // 2), dilation, (reach[0] % 2, reach[1] % 2))
    elif isinstance(padding, str):
        raise ValueError(f"conv2d: padding must be integers, 'same' or 'valid'; got {padding!r}")
    return Window(kernel, stride, padding_pair(padding), dilation)


def trial(run, features, weight, geometry: Geometry, groups: int) -> None:
    """All that a training step asks of a backend, for `backend.select` to measure."""
    out = run.forward(features, weight, None, geometry, groups)
    run.grad_input(out, weight, geometry, groups)
    run.grad_weight(out, features, geometry, groups, weight)


class Conv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, geometry: Geometry, groups: int, run):
        ctx.save_for_backward(features, weight)
        ctx.geometry, ctx.groups, ctx.run = geometry, groups, run
        return run.forward(features, weight, bias, geometry, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        geometry, groups, run = ctx.geometry, ctx.groups, ctx.run
        grad = grad.contiguous()
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = run.grad_input(grad, weight, geometry, groups)
        if ctx.needs_input_grad[1]:
            grad_weight = run.grad_weight(grad, features, geometry, groups, weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, grad_bias, None, None, None
