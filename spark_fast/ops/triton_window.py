"""Device functions of the window kernels: where a row lies in its image, and which source row it reads at a tap.

The arithmetic is that of `spark_fast.ops.window.axis_table`, done on the fly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spark_fast.ops.window import MASKED, OUTSIDE, Geometry

_MASKED = tl.constexpr(MASKED)
_OUTSIDE = tl.constexpr(OUTSIDE)


def window_constant(geometry: Geometry, transposed: bool = False) -> tuple[int, ...]:
    """WINDOW, a constant of window kernels that gather from the source to the query patches or, transposed, back:

    0-1 query patch (height, width in pixels), 2-3 source patch, 4 kernel width, 5-6 stride (rows, columns),
    7-8 padding, 9-10 dilation, 11 transposed.
    """
    window = geometry.window
    source, query = geometry.patch_in, geometry.patch_out
    if transposed:
        source, query = query, source
    return (*query, *source, window.kernel[1], *window.stride, *window.padding, *window.dilation, int(transposed))


@triton.jit
def place(row, exists, coords, WINDOW: tl.constexpr):
    """Image, y and x (int32, the shape of `row`) of query rows; coords (patches, 3) int32."""
    patch = row // (WINDOW[0] * WINDOW[1])
    inside = row % (WINDOW[0] * WINDOW[1])
    image = tl.load(coords + 3 * patch, mask=exists, other=0)
    y = tl.load(coords + 3 * patch + 1, mask=exists, other=0) * WINDOW[0] + inside // WINDOW[1]
    x = tl.load(coords + 3 * patch + 2, mask=exists, other=0) * WINDOW[1] + inside % WINDOW[1]
    return image, y, x


@triton.jit
def _along(at, k, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The source coordinate of a query coordinate at tap k, and whether the tap exists there."""
    if TRANSPOSED:
        scaled = at + PADDING - k * DILATION
        source = scaled // STRIDE
        exists = (scaled >= 0) & (scaled % STRIDE == 0)
    else:
        source = at * STRIDE - PADDING + k * DILATION
        exists = source >= 0
    return source, exists


@triton.jit
def source_row(image, y, x, exists, tap, grid_to_patch, grid_h, grid_w, WINDOW: tl.constexpr):
    """The row (int32) that the query pixel (image, y, x) reads at `tap`; MASKED or OUTSIDE (both negative) where none.

    `tap` broadcasts against the pixels. grid_to_patch (B, grid_h, grid_w) int32 numbers the source's patches.
    """
    source_y, has_y = _along(y, tap // WINDOW[4], WINDOW[5], WINDOW[7], WINDOW[9], WINDOW[11])
    source_x, has_x = _along(x, tap % WINDOW[4], WINDOW[6], WINDOW[8], WINDOW[10], WINDOW[11])
    inside = exists & has_y & has_x & (source_y < grid_h * WINDOW[2]) & (source_x < grid_w * WINDOW[3])
    cell = (image * grid_h + source_y // WINDOW[2]) * grid_w + source_x // WINDOW[3]
    patch = tl.load(grid_to_patch + cell, mask=inside, other=_OUTSIDE)
    row = (patch * WINDOW[2] + source_y % WINDOW[2]) * WINDOW[3] + source_x % WINDOW[3]
    return tl.where(patch < 0, patch, row)
