"""The decoder's doubling of the resolution: a transposed convolution and a 3x3 convolution with nothing in between."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.conv import graph
from spark_fast.ops.conv.api import Conv2dFunction
from spark_fast.ops.conv.cells import WIDE, WINDOW, composed, composed_grads, rows
from spark_fast.ops.conv.dense import dense_conv2d
from spark_fast.ops.window import Geometry, Window

UP = Window((4, 4), (2, 2), (1, 1))


def up_conv2d(
    images: torch.Tensor, up_weight: torch.Tensor, up_bias: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """conv2d(conv_transpose2d(images, up_weight, up_bias, stride=2, padding=1), weight, padding=1).

    Both are linear, so that together they are one 3x3 convolution of the small map with 4 O outputs, one set for each
    place in a 2x2 cell, and the first one's 16 C C products per pixel are saved. Where that costs less than making its
    kernel (144 C C O products), and on a CPU, it is done so.

    Args:
        images: (B, C, H, W), floating point, channels-last in memory at best.
        up_weight: (C, M, 4, 4), the images' dtype, as are all others.
        up_bias: (M,).
        weight: (O, M, 3, 3).

    Returns:
        (B, O, 2 H, 2 W), channels-last in memory.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    images, up_weight, up_bias, weight = checks.autocast(images, up_weight, up_bias, weight)
    if images.dim() != 4:
        raise ValueError(f"up_conv2d: images must be (B, C, H, W); got shape {tuple(images.shape)}")
    if up_weight.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"up_conv2d: up_weight must be (C, M, 4, 4) and weight (O, M, 3, 3); got shapes {tuple(up_weight.shape)} "
            f"and {tuple(weight.shape)}"
        )
    middle = up_weight.shape[1]
    checks.check_like("up_conv2d", "up_weight", up_weight, images, (images.shape[1], middle, 4, 4))
    checks.check_like("up_conv2d", "up_bias", up_bias, images, (middle,))
    checks.check_like("up_conv2d", "weight", weight, images, (weight.shape[0], middle, 3, 3))
    if torch.compiler.is_compiling():
        if graph.has_cells(images.device) and _pays(images, weight):
            return graph.up_conv2d(images, up_weight, up_bias, weight)
        return dense_conv2d(F.conv_transpose2d(images, up_weight, up_bias, stride=2, padding=1), weight)
    run = backend.select("conv", images.device, images.dtype)
    if hasattr(run, "cell_forward") and _pays(images, weight):
        return ComposedFunction.apply(images, up_weight, up_bias, weight, run)
    return dense_conv2d(ConvTranspose2dFunction.apply(images, up_weight, up_bias, run), weight)


def _pays(images: torch.Tensor, weight: torch.Tensor) -> bool:
    batch, channels, height, width = images.shape
    composing, saved = 144 * channels * weight.shape[0], 16 * batch * height * width * channels
    return saved > 4 * composing and not (height % 2 or width % 2 or weight.shape[0] % 16 or channels < 16)


def _convolve(run, rows: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    return Conv2dFunction.apply(rows, weight, None, Geometry.dense(count, (4, 4), WIDE, rows.device), 1, run)


class ComposedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, up_weight, up_bias, weight, run):
        ctx.save_for_backward(images, up_weight, up_bias, weight)
        ctx.run = run
        return composed(images, up_weight, up_bias, weight, run)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        run = ctx.run

        def geometry(size: tuple[int, int, int]) -> Geometry:
            return Geometry.dense(size[0], size[1:], WINDOW, grad.device)

        return *composed_grads(
            grad,
            ctx.saved_tensors,
            partial(_convolve, run),
            lambda grad_rows, kernel, size: run.cell_grad_input(grad_rows, kernel, geometry(size)),
            lambda grad_rows, rows, kernel, size: run.cell_grad_weight(grad_rows, rows, geometry(size), kernel),
            ctx.needs_input_grad[0],
        ), None


class ConvTranspose2dFunction(torch.autograd.Function):
    """conv_transpose2d with a 4x4 kernel, stride 2, padding 1. PyTorch's, but for the weight's gradient on a CPU: there
    its library is slow, and the pairs are those of the convolution that this one transposes."""

    @staticmethod
    def forward(ctx, images, weight, bias, run):
        ctx.save_for_backward(images, weight)
        ctx.run = run
        return F.conv_transpose2d(images, weight, bias, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        images, weight = ctx.saved_tensors
        own = hasattr(ctx.run, "cell_forward")  # the compiled kernels
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not own, ctx.needs_input_grad[2] and not own)
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, images, weight, [weight.shape[1]], [2, 2], [1, 1], [1, 1], True, [0, 0], 1, wanted
        )
        if own and ctx.needs_input_grad[1]:
            geometry = Geometry.dense(grad.shape[0], tuple(grad.shape[2:]), UP, grad.device)
            grad_weight = ctx.run.grad_weight(rows(images), rows(grad), geometry, 1, weight)
        if own and ctx.needs_input_grad[2]:
            grad_bias = rows(grad).sum(0)
        return grad_input, grad_weight, grad_bias, None
