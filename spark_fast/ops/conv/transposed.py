"""Transposed convolution: the gradient of a convolution, so its backends' `grad_input` is the forward pass here."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.conv import graph
from spark_fast.ops.graph import window_tables
from spark_fast.ops.linear.api import linear
from spark_fast.ops.window import Geometry, Window, padding_pair, pair
from spark_fast.patches import ActivePatches


def conv_transpose2d(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    patches: ActivePatches,
    side: int,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> tuple[torch.Tensor, int]:
    """Transposed convolution of the active pixels; outputs are the active pixels of the output map.

    Equal to torch.nn.functional.conv_transpose2d of the zero-filled map, times the mask at the output's resolution.

    Args:
        features: (P * side * side, C) rows, float16/bfloat16/float32/float64. Sums are kept in at least float32.
        weight: (C, O / groups, kh, kw), the features' dtype (any floating dtype under torch.autocast).
        bias: (O,) or None.
        patches: the P active patches.
        side: a patch's side in pixels of this map.
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d.

    Returns:
        rows (P * side_out * side_out, O) and side_out.

    Raises:
        TypeError, ValueError: an argument does not fit the others, or the output map is not a whole number of pixels
            for each patch; the message names it.
    """
    checks.check_rows("conv_transpose2d", features, patches, side)
    window = transposed_window(weight, stride, padding, dilation)
    geometry = _geometry(patches, side, window, pair(output_padding, "output_padding"))
    return convolve_transposed(features, geometry, weight, bias, groups), geometry.side_in


def convolve_transposed(
    features: torch.Tensor, geometry: Geometry, weight: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1
) -> torch.Tensor:
    """What transposes the convolution of `geometry`: from the rows of `geometry.query` to those of `geometry.source`.
    Where they are different patches torch.compile does not trace it.

    Args:
        features: (geometry.rows_out, C).
        weight, bias, groups: as in `conv_transpose2d`.

    Returns:
        rows (geometry.rows_in, O).

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    features, weight, bias = checks.autocast(features, weight, bias)
    channels, out_channels = features.shape[1], weight.shape[1] * groups
    if groups < 1 or channels % groups or channels != weight.shape[0]:
        raise ValueError(
            f"conv_transpose2d: weight {tuple(weight.shape)} with groups={groups} takes {weight.shape[0]} channels, a "
            f"multiple of groups; the features have {channels}"
        )
    checks.check_like("conv_transpose2d", "weight", weight, features, None)
    checks.check_like("conv_transpose2d", "bias", bias, features, (out_channels,))
    if geometry.is_pointwise and groups == 1:
        return linear(features, weight.flatten(1).t(), bias)
    if torch.compiler.is_compiling():
        return graph.conv_transpose2d(features, weight, bias, groups, window_tables(geometry))
    like = features.new_empty(1, 1).expand(geometry.rows_in, out_channels)  # of a convolution's input; has no memory
    if groups == channels == out_channels and groups > 1:
        run = backend.select("depthwise", features.device, features.dtype, like, weight, geometry)
        return TransposedFunction.apply(features, weight, bias, geometry, (), run)
    run = backend.select("conv", features.device, features.dtype, like, weight, geometry, groups)
    return TransposedFunction.apply(features, weight, bias, geometry, (groups,), run)


def transposed_window(weight: torch.Tensor, stride, padding, dilation) -> Window:
    """The window of the convolution that the arguments transpose.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"conv_transpose2d: weight must be (in, out / groups, kh, kw); got shape {tuple(weight.shape)}"
        )
    settings = (pair(stride, "stride"), padding_pair(padding), pair(dilation, "dilation"))
    return Window(tuple(weight.shape[2:]), *settings)


def _geometry(patches: ActivePatches, side: int, window: Window, output_padding: tuple[int, int]) -> Geometry:
    """The convolution from maps of the output's size to maps of the input's, on the same patches."""
    if any(not 0 <= extra < step for extra, step in zip(output_padding, window.stride, strict=True)):
        raise ValueError(
            f"conv_transpose2d: output_padding must be at least 0 and less than the stride {window.stride}; got "
            f"{output_padding}"
        )
    size = patches.grid[0] * side, patches.grid[1] * side
    height, width = (
        (size[axis] - 1) * window.stride[axis] - 2 * window.padding[axis] + output_padding[axis]
        + window.dilation[axis] * (window.kernel[axis] - 1) + 1
        for axis in (0, 1)
    )  # fmt: skip
    gh, gw = patches.grid
    if height < 1 or width < 1 or height % gh or width % gw or height // gh != width // gw:
        raise ValueError(
            f"conv_transpose2d: kernel {window.kernel}, stride {window.stride}, padding {window.padding}, "
            f"output_padding {output_padding}, dilation {window.dilation} turns a map of {size[0]}x{size[1]} pixels "
            f"({side} per patch side) into {height}x{width}, which is not a whole number of pixels for each of the "
            f"{gh}x{gw} patches. Use a padding and an output_padding that multiply the size by the stride, or say "
            "where the result lies: spark_fast.nn.functional.conv_transpose2d(..., output=finer)"
        )
    return Geometry(patches, patches, window, (height, width), size)


class TransposedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, geometry: Geometry, settings: tuple, run):
        ctx.save_for_backward(features, weight)
        ctx.geometry, ctx.settings, ctx.run = geometry, settings, run
        out = run.grad_input(features, weight, geometry, *settings)
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        geometry, settings, run = ctx.geometry, ctx.settings, ctx.run
        grad = grad.contiguous()
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = run.forward(grad, weight, None, geometry, *settings)
        if ctx.needs_input_grad[1]:
            grad_weight = run.grad_weight(features, grad, geometry, *settings, weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, grad_bias, None, None, None
