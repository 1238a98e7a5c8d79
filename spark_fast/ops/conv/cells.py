"""A transposed convolution and a 3x3 convolution as one, with the 2x2 pixels of a cell for each pixel of the small map:
the mathematics, for `up.py` and `graph.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from spark_fast.ops.window import Geometry, Window

WINDOW = Window((3, 3), (1, 1), (1, 1))
WIDE = Window((3, 3), (1, 1), (2, 2))  # which gives 6x6 pixels from 4x4


def compose(up_weight: torch.Tensor, weight: torch.Tensor, convolve: Callable) -> torch.Tensor:
    """The kernel (4 O, C, 3, 3) of both: each channel's 4x4 kernel as an image, convolved, gives 6x6, of which each of
    the 2x2 pixels of a cell sees every other row and column, last first.

    Args:
        convolve: takes the rows of all channels' 4x4 kernels (C * 16, M), `weight` and their number C; gives the rows
            (C * 36, O) of their convolutions, WIDE.
    """
    channels, middle = up_weight.shape[:2]
    product = convolve(up_weight.permute(0, 2, 3, 1).reshape(-1, middle), weight, channels)
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


def rows(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def as_images(rows: torch.Tensor, batch: int, height: int, width: int) -> torch.Tensor:
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def composed(images, up_weight, up_bias, weight, run) -> torch.Tensor:
    """`up_conv2d` by the kernels of backend `run`."""
    batch, _, height, width = images.shape
    geometry = Geometry.dense(batch, (height, width), WINDOW, images.device)
    bias = (weight.sum((2, 3)) @ up_bias).repeat(4)
    wide = Geometry.dense(up_weight.shape[0], (4, 4), WIDE, images.device)
    kernel = compose(up_weight, weight, lambda rows, weight, _: run.forward(rows, weight, None, wide, 1))
    out = as_images(run.cell_forward(rows(images), kernel, bias, geometry), batch, 2 * height, 2 * width)
    for edge, excess in zip(_edges(out), _beyond(*_edges(images), up_weight, up_bias, weight), strict=True):
        edge -= excess
    return out


def composed_grads(
    grad: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
    convolve: Callable,
    cell_grad_input: Callable,
    cell_grad_weight: Callable,
    wants_images: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the inputs of `composed`. The large convolutions are the kernels'; the small parts (the composed
    kernel, the bias, the border) are made again, and differentiated by PyTorch.

    Args:
        convolve: see `compose`; differentiable.
        cell_grad_input: of grad_rows (B * 4 H * W, O), kernel and the map's (B, H, W); gives rows (B * H * W, C).
        cell_grad_weight: of grad_rows, the images' rows, kernel and (B, H, W).
    """
    images, *parameters = (t.detach() for t in inputs)
    size = (images.shape[0], *images.shape[2:])
    grad_rows = rows(grad)
    with torch.enable_grad():
        up_weight, up_bias, weight = parameters = [p.requires_grad_() for p in parameters]
        edges = [edge.detach().requires_grad_() for edge in _edges(images)]
        kernel = compose(up_weight, weight, convolve)
        bias = weight.sum((2, 3)) @ up_bias
        excess = _beyond(*edges, up_weight, up_bias, weight)
    grad_input = as_images(cell_grad_input(grad_rows, kernel.detach(), size), *size) if wants_images else None
    grad_kernel = cell_grad_weight(grad_rows, rows(images), kernel.detach(), size)
    *grad_edges, grad_up_weight, grad_up_bias, grad_weight = torch.autograd.grad(
        (kernel, bias, *excess),
        (*edges, up_weight, up_bias, weight),
        (grad_kernel, grad_rows.sum(0), *(-edge for edge in _edges(grad))),
    )
    if grad_input is not None:
        for edge, own in zip(_edges(grad_input), grad_edges, strict=True):
            edge += own
    return grad_input, grad_up_weight, grad_up_bias, grad_weight
