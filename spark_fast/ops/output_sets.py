"""Which pixels of a window op's output are active.

"mask": the set moves to the output's resolution and does not grow (submanifold). A mask of patches stays that mask: its
patches have other sides on the output, and where they would not be a whole number of pixels (padding that does not keep
the size) the mask is read at the output's pixels (`ActivePatches.at`). In any set of single pixels an output pixel is
active where an active input pixel lies in its cell of stride x stride pixels.
"dilated": where one lies in its window, as in spconv's SparseConv2d.

Sets are made on the device with one host sync, for the count, and kept with the input's patches, so that layers share
them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spark_fast.ops.window import Geometry, Window
from spark_fast.patches import ActivePatches

OUTPUTS = ("mask", "dilated")


def check_output(op: str, output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"{op}: output must be 'mask' or 'dilated'; got {output!r}")


def keeps_patches(patches: ActivePatches, side: int, window: Window, output: str, ceil_mode: bool = False) -> bool:
    """Are the output's patches the input's, with another number of pixels or the same?"""
    if output == "dilated":
        return window == Window((1, 1), dilation=window.dilation)
    (gh, gw), (height, width) = patches.grid, window.out_size(_size(patches, side), ceil_mode)
    if min(height, width) < 1:
        return True  # an error to come
    if patches.origin is not None:
        return (height, width) == patches.grid
    return height % gh == width % gw == 0 and height // gh == width // gw


def geometry(
    patches: ActivePatches, side: int, window: Window, output: str = "mask", ceil_mode: bool = False, op: str = "op"
) -> Geometry:
    """The geometry of `window` from the rows of `patches` to those of its output set.

    Raises:
        ValueError: `output` is neither "mask" nor "dilated"; "dilated" and patches of more than one pixel; the kernel
            is larger than the map; or "mask", a set of single pixels and an output map that is neither a whole number
            of pixels for each of them nor as large as the input's cells of stride x stride pixels.
    """
    check_output(op, output)
    if keeps_patches(patches, side, window, output, ceil_mode):
        return Geometry.of(patches, side, window, ceil_mode, op)
    size_in = _size(patches, side)
    size_out = window.out_size(size_in, ceil_mode)
    if min(size_out) < 1:
        return Geometry.of(patches, side, window, ceil_mode, op)  # which says what is wrong
    if output == "dilated":
        if side != 1:
            raise ValueError(f"{op}: output='dilated' takes patches of one pixel; use x.to_pixels() first")
        return Geometry(patches, _reached(patches, window, size_out), window, size_in, size_out)
    if side > 1 or patches.origin is not None:
        return Geometry(patches, patches.at(size_out), window, size_in, size_out)
    cells = zip(size_in, window.stride, size_out, strict=True)
    if not all(out in (length // stride, -(-length // stride)) for length, stride, out in cells):
        raise ValueError(
            f"{op}: kernel {window.kernel}, stride {window.stride}, padding {window.padding}, dilation "
            f"{window.dilation} turns {size_in[0]}x{size_in[1]} pixels into {size_out[0]}x{size_out[1]}, which are not "
            "the cells of stride x stride pixels that output='mask' needs. Use padding that keeps the size, or "
            "output='dilated'"
        )
    # The cells do not depend on the kernel, so that a strided convolution and its shortcut have the same patches.
    return Geometry(
        patches, _reached(patches, Window(window.stride, window.stride), size_out), window, size_in, size_out
    )


def _size(patches: ActivePatches, side: int) -> tuple[int, int]:
    return patches.grid[0] * side, patches.grid[1] * side


def _reached(patches: ActivePatches, window: Window, size: tuple[int, int]) -> ActivePatches:
    """The output pixels, of a map of `size`, whose window holds an active pixel; made once."""
    key = ("reached", window, size)
    if key not in patches.derived:
        with torch.inference_mode(False):  # they stay, perhaps for a training step
            patches.derived[key] = ActivePatches(reached(patches.active, window, size))
    return patches.derived[key]


def reached(active: torch.Tensor, window: Window, size: tuple[int, int]) -> torch.Tensor:
    """bool (B, *size): does the window of an output pixel hold a pixel of `active` (B, H, W)?"""
    pads = []
    for axis in (1, 0):  # F.pad begins with the last dimension
        reach = (size[axis] - 1) * window.stride[axis] + window.dilation[axis] * (window.kernel[axis] - 1) + 1
        before = window.padding[axis]
        pads += [before, reach - before - active.shape[1 + axis]]  # negative: no window reads the last pixels
    padded = F.pad(active[:, None].float(), pads)
    return F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation)[:, 0] > 0
