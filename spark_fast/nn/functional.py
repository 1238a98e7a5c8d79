"""The window ops on SparseTensors, with a choice of the output's active pixels.

`output="mask"`: the active set moves to the output's resolution and does not grow. It is what an unmodified layer does
on a SparseTensor. `output="dilated"`: an output pixel is active if an active one lies in its window, as in spconv's
SparseConv2d; patches then become single pixels. `spark_fast.ops.output_sets` defines both. Layers of the same stride,
or for "dilated" of the same window, share their sets, so that their outputs can be added.

Everywhere: inactive inputs count as 0, and an active output pixel has the value of the dense op on the zero-filled map.
torch.compile breaks its graph where the output's patches are not the input's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from spark_fast.ops import output_sets
from spark_fast.ops.conv import conv_transpose2d as _conv_transpose2d
from spark_fast.ops.conv import convolve, convolve_transposed
from spark_fast.ops.conv.api import conv_window
from spark_fast.ops.conv.transposed import transposed_window
from spark_fast.ops.pool import avg_pool, max_pool, pool_window
from spark_fast.ops.window import Geometry, Window
from spark_fast.patches import ActivePatches
from spark_fast.tensor import SparseTensor

__all__ = ["avg_pool2d", "conv2d", "conv_transpose2d", "max_pool2d"]


def conv2d(
    x: SparseTensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    output: str = "mask",
) -> SparseTensor:
    """torch.nn.functional.conv2d on the active pixels.

    Args:
        x: (B, C, H, W).
        weight: (O, C / groups, kh, kw), the features' dtype (any floating dtype under torch.autocast).
        bias: (O,) or None.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        output: "mask" or "dilated", see the module's docstring.

    Returns:
        (B, O, H_out, W_out).

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    _check("conv2d", x)
    window = conv_window(weight, stride, padding, dilation)
    return windowed("conv2d", x, window, output, False, convolve, weight, bias, groups)


def max_pool2d(
    x: SparseTensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    output: str = "mask",
) -> SparseTensor:
    """torch.nn.functional.max_pool2d of the zero-filled map, at the active pixels of the output.

    Args:
        x: (B, C, H, W).
        kernel_size, stride, padding, dilation, ceil_mode: as in torch.nn.functional.max_pool2d.
        output: "mask" or "dilated", see the module's docstring.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    _check("max_pool2d", x)
    window = pool_window("max_pool2d", kernel_size, stride, padding, dilation)
    return windowed("max_pool2d", x, window, output, ceil_mode, max_pool)


def avg_pool2d(
    x: SparseTensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    output: str = "mask",
) -> SparseTensor:
    """torch.nn.functional.avg_pool2d of the zero-filled map, at the active pixels of the output.

    Args:
        x: (B, C, H, W).
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in
            torch.nn.functional.avg_pool2d.
        output: "mask" or "dilated", see the module's docstring.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    _check("avg_pool2d", x)
    window = pool_window("avg_pool2d", kernel_size, stride, padding)
    return windowed("avg_pool2d", x, window, output, ceil_mode, avg_pool, count_include_pad, divisor_override)


def conv_transpose2d(
    x: SparseTensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    output: SparseTensor | ActivePatches | None = None,
) -> SparseTensor:
    """torch.nn.functional.conv_transpose2d of the zero-filled map, at the active pixels of the output.

    Without `output` the patches stay and grow by the stride. With it the result lies on the pixels of `output`, such as
    the tensor that a strided convolution of the same window made `x` from (spconv's SparseInverseConv2d).

    Args:
        x: (B, C, H, W).
        weight: (C, O / groups, kh, kw), the features' dtype (any floating dtype under torch.autocast).
        bias: (O,) or None.
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d.
        output: where the result lies: a SparseTensor, or patches of one pixel each. Its size, which must be one that a
            convolution of this window makes x's size from, takes the place of `output_padding`.

    Returns:
        (B, O, H_out, W_out).

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    _check("conv_transpose2d", x)
    if output is None:
        settings = (stride, padding, output_padding, groups, dilation)
        return x.with_features(*_conv_transpose2d(x.features, weight, bias, x.patches, x.side, *settings))
    patches, side = (output, 1) if isinstance(output, ActivePatches) else _check("conv_transpose2d: output", output)
    window = transposed_window(weight, stride, padding, dilation)
    size = patches.grid[0] * side, patches.grid[1] * side
    if patches.batch != len(x) or patches.device != x.device:
        raise ValueError(
            f"conv_transpose2d: output has {patches.batch} images on {patches.device}, x {len(x)} on {x.device}"
        )
    if window.out_size(size) != tuple(x.shape[2:]):
        raise ValueError(
            f"conv_transpose2d: output is a map of {size[0]}x{size[1]} pixels, of which kernel {window.kernel}, stride "
            f"{window.stride}, padding {window.padding}, dilation {window.dilation} makes {window.out_size(size)}, but "
            f"x has {tuple(x.shape[2:])}. Give the settings of the convolution that made x"
        )
    return x.with_features(_inverse(x, patches, window, size, weight, bias, groups), side, patches)


def _inverse(x: SparseTensor, patches: ActivePatches, window: Window, size, weight, bias, groups) -> torch.Tensor:
    if torch.compiler.is_compiling() and patches is not x.patches:
        return _inverse_untraced(x, patches, window, size, weight, bias, groups)
    geometry = Geometry(patches, x.patches, window, size, tuple(x.shape[2:]))
    return convolve_transposed(x.features, geometry, weight, bias, groups)


def _check(op: str, x: SparseTensor) -> tuple[ActivePatches, int]:
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{op} must be a SparseTensor; got {type(x).__name__}")
    if x.channels_last:
        raise ValueError(f"{op} expects (B, C, H, W); permute(0, 3, 1, 2) the channels-last tensor first")
    return x.patches, x.side


def windowed(
    op: str, x: SparseTensor, window: Window, output: str, ceil_mode: bool, run: Callable, *settings
) -> SparseTensor:
    """`run(rows, geometry, *settings)`, to the output set that is asked for."""
    output_sets.check_output(op, output)
    if not output_sets.keeps_patches(x.patches, x.side, window, output, ceil_mode):
        if torch.compiler.is_compiling():
            return _windowed_untraced(op, x, window, output, ceil_mode, run, *settings)
        x = x.to_pixels() if output == "dilated" else x
    geometry = output_sets.geometry(x.patches, x.side, window, output, ceil_mode, op)
    return x.with_features(run(x.features, geometry, *settings), geometry.side_out, geometry.query)


_COUNTED = "the output's active pixels are counted"
_windowed_untraced = torch.compiler.disable(windowed, reason=_COUNTED)
_inverse_untraced = torch.compiler.disable(_inverse, reason=_COUNTED)
