"""Device functions of the window kernels: where a row lies in its image, and which source row it reads at a tap.

The arithmetic is that of `spark_fast.ops.window.axis_table`, done on the fly.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from spark_fast.ops.triton_launch import LARGEST
from spark_fast.ops.window import OUTSIDE, Geometry, Window

MOST_PIXELS = 8  # of a run: their sums stay in registers
MOST_TAPS = 8  # of a line that are taken at once: their weights (or sums) stay in registers

_OUTSIDE = tl.constexpr(OUTSIDE)


def window_constant(geometry: Geometry, transposed: bool = False) -> tuple[int, ...]:
    """WINDOW, a constant of window kernels that gather from the source to the query patches or, transposed, back:

    0-1 query patch (height, width in pixels), 2-3 source patch, 4 kernel width, 5-6 stride (rows, columns),
    7-8 padding, 9-10 dilation, 11 transposed.

    Raises:
        ValueError: rows, places in tables or cells of a grid are more than the kernels, which number them in 32 bits,
            can count.
    """
    for patches, rows in ((geometry.source, geometry.rows_in), (geometry.query, geometry.rows_out)):
        if max(rows, 3 * patches.count, patches.grid_to_patch.numel()) > LARGEST:
            raise ValueError(
                f"the Triton kernels take at most {LARGEST} rows and cells of grids, and {LARGEST // 3} patches; got "
                f"{rows}, {patches.grid_to_patch.numel()} and {patches.count}. Use a smaller batch"
            )
    window = geometry.window
    source, query = geometry.patch_in, geometry.patch_out
    if transposed:
        source, query = query, source
    return (*query, *source, window.kernel[1], *window.stride, *window.padding, *window.dilation, int(transposed))


def runs_of(geometry: Geometry, transposed: bool, most_unaligned: int) -> dict[str, Any] | None:
    """How the query's lines are cut into runs of pixels and which source columns a run reads, as constants of kernels.

    Transposed, a run must begin at a multiple of the stride, so that all runs read columns in one pattern; None if the
    patches do not allow that.

    Args:
        most_unaligned: pixels of a run that is not ALIGNED, at most; MOST_PIXELS of one that is.

    Returns:
        PIXELS: of a run; it divides the query patch's width.
        CHUNK: taps of a line that are taken at once.
        FIRST, COLUMNS: the first source column that a run reads through a chunk, and their number. Columns are counted
            from the one that the run's first pixel reads at the chunk's first tap, without padding.
        USES: the tap of the chunk through which column c serves pixel p, at [c * PIXELS + p]; -1 if none.
        ALIGNED: a run is a whole line of a patch, and a chunk a whole line of taps, so that a column has the same place
            in a patch for all runs.
    """
    window = geometry.window
    kernel, stride, padding, dilation = (v[1] for v in (window.kernel, window.stride, window.padding, window.dilation))
    small, large = geometry.patch_out[1], geometry.patch_in[1]
    query, step = (large, stride) if transposed else (small, 1)
    aligned = large == small * stride and query <= MOST_PIXELS and kernel <= MOST_TAPS
    most = MOST_PIXELS if aligned else most_unaligned
    pixels = max((p for p in range(step, most + 1, step) if query % p == 0), default=None)
    if pixels is None:
        return None
    chunks = triton.cdiv(kernel, MOST_TAPS)
    chunk = triton.cdiv(kernel, chunks * step) * step  # transposed: a chunk moves the columns by whole ones
    served = {}  # (pixel, tap) -> column
    for pixel in range(pixels):
        for tap in range(chunk):
            if not transposed:
                served[pixel, tap] = pixel * stride + tap * dilation - padding
            elif (pixel + padding - tap * dilation) % stride == 0:
                served[pixel, tap] = (pixel + padding - tap * dilation) // stride
    first = min(served.values(), default=0)
    columns = max(served.values(), default=-1) - first + 1
    uses = [-1] * (columns * pixels)
    for (pixel, tap), column in served.items():
        uses[(column - first) * pixels + pixel] = tap
    return dict(PIXELS=pixels, CHUNK=chunk, FIRST=first, COLUMNS=columns, USES=tuple(uses), ALIGNED=aligned)


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
def pixel_row(pixel, exists, grid_to_patch, grid_w, SIDE: tl.constexpr):
    """The packed row (int64) of a pixel of channels-last maps, whose pixels are numbered through the batch; negative
    where masked. grid_to_patch (B, grid_h, grid_w) int32. There are at most LARGEST pixels: they divide in 32 bits.
    """
    pixel = pixel.to(tl.int32)
    line, x = pixel // (grid_w * SIDE), pixel % (grid_w * SIDE)  # lines of all images
    patch = tl.load(grid_to_patch + (line // SIDE * grid_w + x // SIDE), mask=exists, other=-1)
    return ((patch * SIDE + line % SIDE) * SIDE + x % SIDE).to(tl.int64)


@triton.jit
def row_pixel(row, exists, coords, grid_h, grid_w, SIDE: tl.constexpr):
    """The inverse of `pixel_row`; coords (patches, 3) int32. There are at most LARGEST rows."""
    row = row.to(tl.int32)
    patch, inside = row // (SIDE * SIDE), row % (SIDE * SIDE)
    at = coords + 3 * patch.to(tl.int64)
    image = tl.load(at, mask=exists, other=0).to(tl.int64)
    grid_y = tl.load(at + 1, mask=exists, other=0)
    grid_x = tl.load(at + 2, mask=exists, other=0)
    line = (image * grid_h + grid_y) * SIDE + inside // SIDE
    return line * (grid_w * SIDE) + grid_x * SIDE + inside % SIDE


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
def source_line(image, y, exists, tap, grid_h, grid_w, WINDOW: tl.constexpr):
    """The source line that the query line y reads at the vertical tap `tap`.

    Returns its first patch's place in grid_to_patch, its number inside the patches, and whether it exists.
    """
    source_y, has = _along(y, tap, WINDOW[5], WINDOW[7], WINDOW[9], WINDOW[11])
    has = exists & has & (source_y < grid_h * WINDOW[2])
    return (image * grid_h + source_y // WINDOW[2]) * grid_w, source_y % WINDOW[2], has


@triton.jit
def line_start(cell, line, exists, patch_x, grid_to_patch, grid_w, WINDOW: tl.constexpr):
    """The row (int32) of the first pixel of a line from `source_line` in the patch of grid column patch_x; MASKED or
    OUTSIDE (both negative) where none."""
    inside = exists & (patch_x >= 0) & (patch_x < grid_w)
    patch = tl.load(grid_to_patch + cell + patch_x, mask=inside, other=_OUTSIDE)
    return tl.where(patch < 0, patch, (patch * WINDOW[2] + line) * WINDOW[3])


@triton.jit
def column_start(
    cell, line, exists, x, tap, grid_to_patch, grid_w, NUMBER: tl.constexpr, ALIGNED: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Where the source column NUMBER (counted as in `runs_of`) lies for the runs that begin at x, for the chunk of taps
    that begins at `tap`: the row from `line_start`, and the pixels from there."""
    if ALIGNED:
        start = line_start(cell, line, exists, x // WINDOW[1] + NUMBER // WINDOW[3], grid_to_patch, grid_w, WINDOW)
        offset = NUMBER % WINDOW[3]
    else:
        if WINDOW[11]:
            column = (x - tap * WINDOW[10]) // WINDOW[6] + NUMBER
        else:
            column = x * WINDOW[6] + tap * WINDOW[10] + NUMBER
        start = line_start(cell, line, exists & (column >= 0), column // WINDOW[3], grid_to_patch, grid_w, WINDOW)
        offset = column % WINDOW[3]
    return start, offset


@triton.jit
def source_row(image, y, x, exists, tap, grid_to_patch, grid_h, grid_w, WINDOW: tl.constexpr):
    """The row (int32) that the query pixel (image, y, x) reads at `tap`; MASKED or OUTSIDE (both negative) where none.

    `tap` broadcasts against the pixels. grid_to_patch (B, grid_h, grid_w) int32 numbers the source's patches.
    """
    cell, line, has_y = source_line(image, y, exists, tap // WINDOW[4], grid_h, grid_w, WINDOW)
    source_x, has_x = _along(x, tap % WINDOW[4], WINDOW[6], WINDOW[8], WINDOW[10], WINDOW[11])
    start = line_start(cell, line, has_y & has_x, source_x // WINDOW[3], grid_to_patch, grid_w, WINDOW)
    return tl.where(start < 0, start, start + source_x % WINDOW[3])


def candidates(window: Window) -> tuple[int, int]:
    """How many vertical and horizontal taps may exist for an input pixel, see `candidate`."""
    kernel, stride, dilation = window.kernel, window.stride, window.dilation
    return tuple(triton.cdiv(k, s if d == 1 else 1) for k, s, d in zip(kernel, stride, dilation, strict=True))


@triton.jit
def candidate(at, number, AXIS: tl.constexpr, WINDOW: tl.constexpr):
    """The number-th tap through which an output may have read the input coordinate `at`: transposed, only every
    stride-th tap exists where there is no dilation. It may lie beyond the kernel. AXIS: 0 vertical, 1 horizontal."""
    tap = number
    if WINDOW[5 + AXIS] > 1 and WINDOW[9 + AXIS] == 1:
        tap = (at + WINDOW[7 + AXIS]) % WINDOW[5 + AXIS] + number * WINDOW[5 + AXIS]
    return tap


@triton.jit
def candidate_row(
    image, y, x, exists, number, grid_to_patch, grid_h, grid_w, KERNEL_H: tl.constexpr, HORIZONTAL: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """The number-th of all vertical x HORIZONTAL candidates of the input pixel (image, y, x): its tap, and the row read
    there as `source_row` gives it."""
    tap_y = candidate(y, number // HORIZONTAL, 0, WINDOW)
    tap_x = candidate(x, number % HORIZONTAL, 1, WINDOW)
    tap = tap_y * WINDOW[4] + tap_x
    has = exists & (tap_y < KERNEL_H) & (tap_x < WINDOW[4])
    return tap, source_row(image, y, x, has, tap, grid_to_patch, grid_h, grid_w, WINDOW)
