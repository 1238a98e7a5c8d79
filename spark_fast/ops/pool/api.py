"""Max and average pooling on packed rows."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.depthwise.api import depthwise_conv2d
from spark_fast.ops.pool import graph
from spark_fast.ops.window import Geometry, Window, padding_pair, pair
from spark_fast.patches import ActivePatches


def max_pool2d(
    features: torch.Tensor,
    patches: ActivePatches,
    side: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> tuple[torch.Tensor, int]:
    """Maximum over each window; an inactive neighbour counts as 0, the image border as -inf (as in the dense
    simulation of the released code). Of equal values the first in row order receives the gradient.

    Args:
        features: (P * side * side, C) rows of `patches`.
        kernel_size, stride, padding, dilation, ceil_mode: as in torch.nn.functional.max_pool2d.

    Returns:
        rows (P * side_out * side_out, C) and side_out.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    checks.check_rows("max_pool2d", features, patches, side)
    window = pool_window("max_pool2d", kernel_size, stride, padding, dilation)
    geometry = Geometry.of(patches, side, window, ceil_mode, "max_pool2d")
    return max_pool(features, geometry), geometry.side_out


def max_pool(features: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`max_pool2d` from the rows of `geometry.source` (rows_in, C) to those of `geometry.query` (rows_out, C), which
    may be other patches (`spark_fast.ops.output_sets`); such a one is not traced by torch.compile.

    Raises:
        ValueError: the window has 2**15 elements or more.
    """
    if geometry.window.taps > torch.iinfo(torch.int16).max:
        raise ValueError(f"max_pool2d: kernel_size must have less than 2**15 elements; got {geometry.window.kernel}")
    if torch.compiler.is_compiling():
        return graph.max_pool2d(features, geometry)
    run = backend.select("pool", features.device, features.dtype, features, geometry)
    return MaxPool2dFunction.apply(features, geometry, run)


def avg_pool2d(
    features: torch.Tensor,
    patches: ActivePatches,
    side: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Average over each window; inactive neighbours count as 0 and the divisor is the dense op's.

    Arguments, returns and errors as for `max_pool2d`, and as in torch.nn.functional.avg_pool2d.
    """
    checks.check_rows("avg_pool2d", features, patches, side)
    window = pool_window("avg_pool2d", kernel_size, stride, padding)
    geometry = Geometry.of(patches, side, window, ceil_mode, "avg_pool2d")
    return avg_pool(features, geometry, count_include_pad, divisor_override), geometry.side_out


def avg_pool(
    features: torch.Tensor, geometry: Geometry, count_include_pad: bool = True, divisor_override: int | None = None
) -> torch.Tensor:
    """`avg_pool2d` from the rows of `geometry.source` (rows_in, C) to those of `geometry.query` (rows_out, C), which
    may be other patches (`spark_fast.ops.output_sets`); such a one is not traced by torch.compile.

    Raises:
        ValueError: `divisor_override` is 0.
    """
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be 0")
    half = features.dtype in (torch.float16, torch.bfloat16)
    rows = features.float() if half else features  # the sum may not fit the smaller type
    ones = rows.new_ones(rows.shape[1], 1, *geometry.window.kernel)
    total = depthwise_conv2d(rows, ones, None, geometry)
    mean = total / (divisor_override or _divisor(geometry, count_include_pad))
    return mean.to(features.dtype)


def pool_window(op: str, kernel_size, stride=None, padding=0, dilation=1) -> Window:
    """The window of a pooling's arguments.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    kernel = pair(kernel_size, "kernel_size")
    stride = kernel if stride is None or stride in ([], ()) else pair(stride, "stride")
    window = Window(kernel, stride, padding_pair(padding), pair(dilation, "dilation"))
    if any(2 * p > k for p, k in zip(window.padding, kernel, strict=True)):
        raise ValueError(f"{op}: padding must be at most half of the kernel; got {window.padding} for {kernel}")
    return window


def _divisor(geometry: Geometry, count_include_pad: bool) -> torch.Tensor | int:
    """Elements in each output row's window: (rows_out, 1), or a number where all are equal."""
    patches, side = geometry.query, geometry.side_out
    lengths = [_window_lengths(geometry, axis, count_include_pad) for axis in (0, 1)]
    if all(min(length) == max(length) for length in lengths):
        return lengths[0][0] * lengths[1][0]
    vertical, horizontal = (_on_device(length, patches.device) for length in lengths)
    area = vertical[:, None] * horizontal  # (H_out, W_out)
    by_patch = area.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)  # (gh, gw, side, side)
    return by_patch[patches.index[1], patches.index[2]].reshape(-1, 1)


def _window_lengths(geometry: Geometry, axis: int, count_include_pad: bool) -> list[int]:
    """The pixels of each output coordinate's window along an axis."""
    size, kernel = geometry.size_in[axis], geometry.window.kernel[axis]
    padding, stride = geometry.window.padding[axis], geometry.window.stride[axis]
    low, high = (-padding, size + padding) if count_include_pad else (0, size)
    starts = [o * stride - padding for o in range(geometry.size_out[axis])]
    return [min(s + kernel, size + padding, high) - max(s, low) for s in starts]


def _on_device(lengths: list[int], device: torch.device) -> torch.Tensor:
    """The lengths as a tensor, which differ from their middle one at both ends only: filled in there, since a copy from
    the host makes a GPU wait, and cannot be recorded in a CUDA graph."""
    middle = lengths[len(lengths) // 2]
    out = torch.full((len(lengths),), middle, device=device)
    for place, length in enumerate(lengths):
        if length != middle:
            out[place].fill_(length)
    return out


def trial(run, features, geometry: Geometry) -> None:
    """All that a training step asks of a backend, for `backend.select` to measure."""
    run.max_grad_input(*run.max_forward(features, geometry), geometry)


class MaxPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, geometry: Geometry, run):
        out, argmax = run.max_forward(features, geometry)
        ctx.save_for_backward(argmax)
        ctx.geometry, ctx.run = geometry, run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (argmax,) = ctx.saved_tensors
        return ctx.run.max_grad_input(grad.contiguous(), argmax, ctx.geometry), None, None
