"""The decoder's doubling of the resolution: a transposed convolution and a 3x3 convolution with nothing in between."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.conv.api import Conv2dFunction
from spark_fast.ops.conv.dense import WINDOW, dense_conv2d
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
    run = backend.select("conv", images.device, images.dtype)
    if hasattr(run, "cell_forward") and _pays(images, weight):
        return ComposedFunction.apply(images, up_weight, up_bias, weight, run)
    return dense_conv2d(ConvTranspose2dFunction.apply(images, up_weight, up_bias, run), weight)


def _pays(images: torch.Tensor, weight: torch.Tensor) -> bool:
    batch, channels, height, width = images.shape
    composing, saved = 144 * channels * weight.shape[0], 16 * batch * height * width * channels
    return saved > 4 * composing and not (height % 2 or width % 2 or weight.shape[0] % 16 or channels < 16)


def _compose(up_weight: torch.Tensor, weight: torch.Tensor, run) -> torch.Tensor:
    """The kernel (4 O, C, 3, 3) of both: each channel's 4x4 kernel as an image, convolved, gives 6x6, of which each of
    the 2x2 pixels of a cell sees every other row and column, last first."""
    channels, middle = up_weight.shape[:2]
    geometry = Geometry.dense(channels, (4, 4), Window((3, 3), (1, 1), (2, 2)), weight.device)
    rows = up_weight.permute(0, 2, 3, 1).reshape(-1, middle)
    product = Conv2dFunction.apply(rows, weight, None, geometry, 1, run)  # (C * 36, O)
    taps = product.view(channels, 3, 2, 3, 2, -1).flip(1, 3)
    return taps.permute(2, 4, 5, 0, 1, 3).reshape(-1, channels, 3, 3)


def _beyond(first_row, last_row, first_column, last_column, up_weight, up_bias, weight) -> tuple[torch.Tensor, ...]:
    """What the 3x3 kernel would add to the first and last row and column of its output if the upsampled map went on
    beyond its border as the transposed convolution does. There it is 0."""
    top = F.conv_transpose2d(first_row, up_weight[:, :, :1], up_bias, stride=2)  # (B, M, 1, 2 W + 2)
    bottom = F.conv_transpose2d(last_row, up_weight[:, :, 3:], up_bias, stride=2)
    left = F.conv_transpose2d(first_column, up_weight[..., :1], up_bias, stride=2, padding=(1, 0))  # (B, M, 2 H, 1)
    right = F.conv_transpose2d(last_column, up_weight[..., 3:], up_bias, stride=2, padding=(1, 0))
    return (
        F.conv2d(top, weight[:, :, :1]),
        F.conv2d(bottom, weight[:, :, 2:]),
        F.conv2d(left, weight[..., :1], padding=(1, 0)),
        F.conv2d(right, weight[..., 2:], padding=(1, 0)),
    )


def _edges(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return images[:, :, :1], images[:, :, -1:], images[..., :1], images[..., -1:]


def _rows(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: torch.Tensor, batch: int, height: int, width: int) -> torch.Tensor:
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


class ComposedFunction(torch.autograd.Function):
    """The large convolutions are the kernels'; the small parts (the composed kernel, the bias, the border) are made
    again in the backward pass, and differentiated by PyTorch."""

    @staticmethod
    def forward(ctx, images, up_weight, up_bias, weight, run):
        ctx.save_for_backward(images, up_weight, up_bias, weight)
        ctx.run = run
        batch, _, height, width = images.shape
        geometry = Geometry.dense(batch, (height, width), WINDOW, images.device)
        bias = (weight.sum((2, 3)) @ up_bias).repeat(4)
        rows = run.cell_forward(_rows(images), _compose(up_weight, weight, run), bias, geometry)
        out = _images(rows, batch, 2 * height, 2 * width)
        for edge, excess in zip(_edges(out), _beyond(*_edges(images), up_weight, up_bias, weight), strict=True):
            edge -= excess
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        images, *parameters = (t.detach() for t in ctx.saved_tensors)
        batch, _, height, width = images.shape
        geometry = Geometry.dense(batch, (height, width), WINDOW, images.device)
        grad_rows = _rows(grad)
        with torch.enable_grad():
            up_weight, up_bias, weight = parameters = [p.requires_grad_() for p in parameters]
            edges = [edge.detach().requires_grad_() for edge in _edges(images)]
            kernel = _compose(up_weight, weight, ctx.run)
            bias = weight.sum((2, 3)) @ up_bias
            excess = _beyond(*edges, up_weight, up_bias, weight)
        grad_input = None
        if ctx.needs_input_grad[0]:
            rows = ctx.run.cell_grad_input(grad_rows, kernel.detach(), geometry)
            grad_input = _images(rows, batch, height, width)
        grad_kernel = ctx.run.cell_grad_weight(grad_rows, _rows(images), geometry, kernel)
        *grad_edges, grad_up_weight, grad_up_bias, grad_weight = torch.autograd.grad(
            (kernel, bias, *excess),
            (*edges, up_weight, up_bias, weight),
            (grad_kernel, grad_rows.sum(0), *(-edge for edge in _edges(grad))),
        )
        if grad_input is not None:
            for edge, own in zip(_edges(grad_input), grad_edges, strict=True):
                edge += own
        return grad_input, grad_up_weight, grad_up_bias, grad_weight, None


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
            grad_weight = ctx.run.grad_weight(_rows(images), _rows(grad), geometry, 1, weight)
        if own and ctx.needs_input_grad[2]:
            grad_bias = _rows(grad).sum(0)
        return grad_input, grad_weight, grad_bias, None
