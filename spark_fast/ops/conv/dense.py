"""3x3 convolution to dense maps: of dense maps (the decoder's), and of sparse ones around a constant (densify)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, checks
from spark_fast.ops.conv import graph
from spark_fast.ops.conv.api import Conv2dFunction
from spark_fast.ops.conv.cells import WINDOW
from spark_fast.ops.graph import dense_tables
from spark_fast.ops.window import Geometry
from spark_fast.patches import ActivePatches


def dense_conv2d(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.conv2d(images, weight, bias, padding=1) for 3x3 kernels.

    Args:
        images: (B, C, H, W), floating point; channels-last memory saves a copy.
        weight: (O, C, 3, 3), the images' dtype (any floating dtype under torch.autocast).
        bias: (O,) or None.

    Returns:
        (B, O, H, W), channels-last in memory.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    if images.dim() != 4:
        raise ValueError(f"dense_conv2d: images must be (B, C, H, W); got shape {tuple(images.shape)}")
    images, weight, bias = checks.autocast(images, weight, bias)
    _check("dense_conv2d", images, weight, bias, images.shape[1])
    batch, channels, *size = images.shape
    rows = images.permute(0, 2, 3, 1).reshape(-1, channels)
    return _apply(rows, weight, bias, None, batch, tuple(size))


def project(
    features: torch.Tensor,
    token: torch.Tensor,
    patches: ActivePatches,
    side: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    relative: bool = False,
) -> torch.Tensor:
    """3x3 convolution (padding 1) of the maps that hold `features` at active pixels and `token` at masked ones
    (paper, section 3.2), without making them.

    The convolution is linear: that of the constant map `token`, which differs only at the image's border, plus that of
    the active pixels' distances from it.

    Args:
        features: (P * side * side, C) rows of `patches`.
        token: (C,), the features' dtype.
        weight: (O, C, 3, 3), the features' dtype (any floating dtype under torch.autocast).
        bias: (O,) or None.
        relative: `features` are distances from the token already, so that no pass over them is needed.

    Returns:
        (B, O, gh * side, gw * side), channels-last in memory.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    checks.check_rows("project", features, patches, side)
    features, token, weight, bias = checks.autocast(features, token, weight, bias)
    checks.check_like("project", "token", token, features, (features.shape[1],))
    _check("project", features, weight, bias, features.shape[1])
    size = (patches.grid[0] * side, patches.grid[1] * side)
    distances = features if relative else features - token
    return _apply(distances, weight, bias, patches, patches.batch, size) + _constant(token, weight, size)


def _constant(token: torch.Tensor, weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The convolution (1, O, H, W) of a map that is `token` everywhere: the sum of the taps that lie in the image."""
    if min(size) < 2:
        raise ValueError(f"project: a map must be at least 2 pixels high and wide; got {size}")
    taps = torch.matmul(token, weight.flatten(2)).view(-1, 3, 3)  # (O, 3, 3)
    inside = taps.new_ones(3, 3)  # which taps a first, an inner and a last pixel of a line have
    inside[0, 0].zero_()
    inside[2, 2].zero_()
    kinds = (inside @ taps @ inside)[None]  # (1, O, 3, 3)
    for axis, length in ((2, size[0]), (3, size[1])):
        first, inner, last = kinds.split(1, axis)
        repeat = [-1, -1, -1, -1]
        repeat[axis] = length - 2
        kinds = torch.cat((first, inner.expand(repeat), last), axis)
    return kinds.contiguous(memory_format=torch.channels_last)


def _check(op: str, like: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, channels: int) -> None:
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3):
        raise ValueError(f"{op}: weight must be (O, {channels}, 3, 3); got shape {tuple(weight.shape)}")
    checks.check_like(op, "weight", weight, like, None)
    checks.check_like(op, "bias", bias, like, (weight.shape[0],))


def _apply(rows, weight, bias, patches: ActivePatches | None, batch: int, size: tuple[int, int]) -> torch.Tensor:
    """Dense maps (B, O, H, W) from the rows of `patches`, or of all pixels (None), of maps of `size`."""
    if torch.compiler.is_compiling():
        out = graph.conv2d(rows, weight, bias, 1, dense_tables(patches, batch, size, WINDOW))
    else:
        if patches is None:
            geometry = Geometry.dense(batch, size, WINDOW, rows.device)
        else:
            geometry = Geometry.densifying(patches, size[0] // patches.grid[0], WINDOW)
        run = backend.select("conv", rows.device, rows.dtype, rows, weight, geometry, 1)
        out = Conv2dFunction.apply(rows, weight, bias, geometry, 1, run)
    return out.view(batch, *size, weight.shape[0]).permute(0, 3, 1, 2)
