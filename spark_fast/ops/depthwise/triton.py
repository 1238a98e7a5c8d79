"""Triton kernels of the depthwise convolution, without atomics.

Runs of pixels of a patch's line are computed together (`gather_lines`): each source column is loaded once for all taps
and pixels that read it. What no run fits goes row by row (`gather_rows`). Both serve forward and grad-input (the
transposed gather). The weight's gradient goes by runs too (`product_lines`), in parts that are added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.depthwise import configs
from spark_fast.ops.triton_launch import launch, unavailable  # noqa: F401  (asked by ops.backend)
from spark_fast.ops.triton_window import (
    candidate, candidates, place, row_on_line, source_line, source_row, window_constant,
)  # fmt: skip
from spark_fast.ops.window import Geometry, Window

MOST_PIXELS = 8  # of a run: their sums stay in registers
MOST_TAPS = 8  # of a line that are taken at once: their weights (or sums) stay in registers
PROGRAMS = 1024  # of a weight gradient: enough to fill any GPU; a fixed number, so that sums do not depend on the GPU
MOST_STEPS = 8  # lines of taps per program of a weight gradient: how large its partial sums get
LEAST_PART = 64  # runs


def unsupported(features, weight, geometry: Geometry) -> str | None:
    if features.dtype == torch.float64:
        return "float64 runs in the reference"
    return None


def forward(features, weight, bias, geometry: Geometry) -> torch.Tensor:
    return _gather(features, weight, bias, geometry, transposed=False)


def grad_input(grad, weight, geometry: Geometry) -> torch.Tensor:
    return _gather(grad, weight, None, geometry, transposed=True)


def _gather(source, weight, bias, geometry: Geometry, transposed: bool) -> torch.Tensor:
    source = source.contiguous()
    channels = source.shape[1]
    taps = geometry.window.taps
    weight = weight.new_empty(taps, channels, dtype=torch.float32).copy_(weight.reshape(channels, taps).t())
    query, reads = (geometry.source, geometry.query) if transposed else (geometry.query, geometry.source)
    rows = geometry.rows_in if transposed else geometry.rows_out
    window = window_constant(geometry, transposed)
    pixels = run_length(window)
    tables = query.coords, reads.grid_to_patch
    bias = None if bias is None else bias.contiguous()

    def run(config):
        out = source.new_empty(rows, channels)
        blocks = triton.cdiv(channels, config["BLOCK_C"])
        if pixels == 1:
            launch(
                gather_rows, (triton.cdiv(rows, config["BLOCK_R"]) * blocks,), source, weight, bias, out, *tables,
                rows, *reads.grid, CHANNELS=channels, TAPS=taps, WINDOW=window, **config,
            )  # fmt: skip
        else:
            first, columns, chunk, uses = columns_of_run(geometry.window, pixels, transposed)
            lines = candidates(geometry.window)[0] if transposed else geometry.window.kernel[0]
            runs = rows // pixels
            launch(
                gather_lines, (triton.cdiv(runs, config["BLOCK_R"]) * blocks,), source, weight, bias, out, *tables,
                runs, *reads.grid, CHANNELS=channels, KERNEL_H=geometry.window.kernel[0], LINES=lines, PIXELS=pixels,
                FIRST=first, COLUMNS=columns, CHUNK=chunk, USES=uses, WINDOW=window, **config,
            )  # fmt: skip
        return out

    name, choices = ("depthwise.rows", configs.ROWS) if pixels == 1 else ("depthwise.lines", configs.LINES)
    case = (source.dtype, channels, taps, *window)
    return tuning.run(name, case, rows, choices, _fitting(choices, channels), run, source.device)


def grad_weight(grad, features, geometry: Geometry, weight) -> torch.Tensor:
    grad, features = grad.contiguous(), features.contiguous()
    channels, taps = features.shape[1], geometry.window.taps
    window = window_constant(geometry)
    pixels = max(p for p in range(1, MOST_PIXELS + 1) if window[1] % p == 0)
    first, columns, chunk, uses = columns_of_run(geometry.window, pixels, transposed=False)
    runs = geometry.rows_out // pixels
    steps = geometry.window.kernel[0] * triton.cdiv(geometry.window.kernel[1], chunk)

    def run(config):
        blocks, block = triton.cdiv(channels, config["BLOCK_C"]), config["BLOCK_R"]
        groups = triton.cdiv(steps, MOST_STEPS)
        parts = max(1, min(triton.cdiv(PROGRAMS, groups * blocks), triton.cdiv(runs, LEAST_PART)))
        part_runs = triton.cdiv(triton.cdiv(runs, parts), block) * block
        sums = features.new_empty(parts, taps, channels, dtype=torch.float32)
        launch(
            product_lines, (groups * blocks, parts), features, grad, sums, geometry.query.coords,
            geometry.source.grid_to_patch, runs, part_runs, *geometry.source.grid, CHANNELS=channels, STEPS=steps,
            GROUP_STEPS=triton.cdiv(steps, groups), PIXELS=pixels, FIRST=first, COLUMNS=columns, CHUNK=chunk,
            USES=uses, TAPS=taps, WINDOW=window, **config,
        )  # fmt: skip
        total = sums[0] if parts == 1 else sums.sum(0)  # (taps, C), in a fixed order
        return total.t().reshape(weight.shape).to(weight.dtype)

    case = (features.dtype, channels, taps, *window)
    default = _fitting(configs.WEIGHT, channels)
    return tuning.run("depthwise.product", case, geometry.rows_out, configs.WEIGHT, default, run, features.device)


def _fitting(choices, channels: int):
    """The first choice that computes fewest channels in vain."""
    return min(choices, key=lambda config: triton.cdiv(channels, config["BLOCK_C"]) * config["BLOCK_C"])


def run_length(window: tuple[int, ...]) -> int:
    """Pixels of a run: a divisor of the query patch's width and, transposed, a multiple of the stride (then all runs
    read the same columns relative to their first pixel); 1 if there is none."""
    step = window[6] if window[11] else 1
    return max((p for p in range(1, MOST_PIXELS + 1) if window[1] % p == 0 and p % step == 0), default=1)


def columns_of_run(window: Window, pixels: int, transposed: bool) -> tuple[int, int, int, tuple[int, ...]]:
    """Which source columns a run of query pixels reads through a line of taps, or a chunk of one.

    Returns:
        first: the first column, relative to the one that the run's first pixel reads at tap 0 without padding.
        columns: their number.
        chunk: taps taken at once.
        uses: the tap of the chunk through which column c serves pixel p, at [c * pixels + p]; -1 if none.
    """
    kernel, stride, padding, dilation = (v[1] for v in (window.kernel, window.stride, window.padding, window.dilation))
    chunk = triton.cdiv(kernel, triton.cdiv(kernel, MOST_TAPS))
    if transposed:
        chunk = triton.cdiv(chunk, stride) * stride  # so that a chunk moves the columns by whole ones
        served = {(p, k): p + padding - k * dilation for p in range(pixels) for k in range(chunk)}
        served = {pair: scaled // stride for pair, scaled in served.items() if scaled % stride == 0}
    else:
        served = {(p, k): p * stride - padding + k * dilation for p in range(pixels) for k in range(chunk)}
    first = min(served.values(), default=0)
    columns = max(served.values(), default=-1) - first + 1
    uses = [-1] * (columns * pixels)
    for (p, k), column in served.items():
        uses[(column - first) * pixels + p] = k
    return first, columns, chunk, tuple(uses)


@triton.jit
def _first_column(x, tap, WINDOW: tl.constexpr):
    """The source column that a run's first pixel, in column x, reads at `tap`, without padding."""
    if WINDOW[11]:
        column = (x - tap * WINDOW[10]) // WINDOW[6]
    else:
        column = x * WINDOW[6] + tap * WINDOW[10]
    return column


@triton.jit(do_not_specialize=["runs"])
def gather_lines(
    source,
    weight,
    bias,
    out,
    coords,
    grid_to_patch,
    runs,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    LINES: tl.constexpr,
    PIXELS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    USES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r] = bias + sum over taps t of source[row that r reads at t] * weight[t], for runs of PIXELS rows.

    source (source rows, CHANNELS), weight (taps, CHANNELS) float32, bias (CHANNELS,) or None, out (runs * PIXELS,
    CHANNELS). LINES lines of taps may exist for a pixel. FIRST, COLUMNS, CHUNK, USES: see `columns_of_run`.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (WINDOW[4] + CHUNK - 1) // CHUNK
    number = (tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = number < runs
    has = channel < CHANNELS
    image, y, x = place(number * PIXELS, exists, coords, WINDOW)
    start = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if bias is not None:
        start += tl.load(bias + channel, mask=has, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(PIXELS):
        sums = sums + (start,)

    for step in range(LINES * chunks):
        tap_y = step // chunks
        if WINDOW[11]:
            tap_y = candidate(y, tap_y, 0, WINDOW)
        tap_x = step % chunks * CHUNK
        cell, line, has_line = source_line(image, y, exists & (tap_y < KERNEL_H), tap_y, grid_h, grid_w, WINDOW)
        weights = ()
        for k in tl.static_range(CHUNK):
            is_tap = (tap_y < KERNEL_H) & (tap_x + k < WINDOW[4])
            at = (tap_y * WINDOW[4] + tap_x + k) * CHANNELS + channel
            weights = weights + (tl.load(weight + at, mask=is_tap & has, other=0.0),)
        column = _first_column(x, tap_x, WINDOW) + FIRST
        for c in tl.static_range(COLUMNS):
            read = row_on_line(cell, line, has_line, column + c, grid_to_patch, grid_w, WINDOW)
            at = read.to(tl.int64) * CHANNELS + channel
            value = tl.load(source + at, mask=(read >= 0) & has, other=0.0).to(tl.float32)
            for p in tl.static_range(PIXELS):
                if USES[c * PIXELS + p] >= 0:
                    product = value * weights[USES[c * PIXELS + p]]
                    if USES[c * PIXELS + p] + CHUNK * (chunks - 1) >= WINDOW[4]:  # NaN times nothing is nothing
                        product = tl.where(tap_x + USES[c * PIXELS + p] < WINDOW[4], product, 0.0)
                    sums = sums[:p] + (sums[p] + product,) + sums[p + 1 :]

    for p in tl.static_range(PIXELS):
        to = (number * PIXELS + p).to(tl.int64) * CHANNELS + channel
        tl.store(out + to, sums[p].to(out.dtype.element_ty), mask=exists & has)


@triton.jit(do_not_specialize=["rows"])
def gather_rows(
    source,
    weight,
    bias,
    out,
    coords,
    grid_to_patch,
    rows,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r] = bias + sum over taps t of source[row that r reads at t] * weight[t], shapes as in `gather_lines`.

    A program with one row only (BLOCK_R = 1) jumps over the taps that the row does not have.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0) // blocks_c * BLOCK_R
    if BLOCK_R > 1:
        row = (row + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = row < rows
    has = channel < CHANNELS
    image, y, x = place(row, exists, coords, WINDOW)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if bias is not None:
        sums += tl.load(bias + channel, mask=has, other=0.0).to(tl.float32)
    for tap in range(TAPS):
        read = source_row(image, y, x, exists, tap, grid_to_patch, grid_h, grid_w, WINDOW)
        if BLOCK_R > 1:
            sums += _product(source, weight, read, tap, channel, CHANNELS)
        elif read >= 0:
            sums += _product(source, weight, read, tap, channel, CHANNELS)
    to = row.to(tl.int64) * CHANNELS + channel
    tl.store(out + to, sums.to(out.dtype.element_ty), mask=exists & has)


@triton.jit
def _product(source, weight, read, tap, channel, CHANNELS: tl.constexpr):
    has = channel < CHANNELS
    at = read.to(tl.int64) * CHANNELS + channel
    value = tl.load(source + at, mask=(read >= 0) & has, other=0.0).to(tl.float32)
    return value * tl.load(weight + tap * CHANNELS + channel, mask=has, other=0.0)


@triton.jit(do_not_specialize=["runs", "part_runs"])
def product_lines(
    source,
    grad,
    out,
    coords,
    grid_to_patch,
    runs,
    part_runs,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    PIXELS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    USES: tl.constexpr,
    TAPS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[p, t] = sum over the rows r of part p of source[row that r reads at tap t] * grad[r].

    source (source rows, CHANNELS), grad (runs * PIXELS, CHANNELS), out (parts, TAPS, CHANNELS) float32. Grid: (groups
    of steps * blocks of channels, parts); a step is a line of taps or a chunk of one. FIRST, COLUMNS, CHUNK, USES: see
    `columns_of_run`.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (WINDOW[4] + CHUNK - 1) // CHUNK
    group = tl.program_id(0) // blocks_c
    channels = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = channels[None, :]
    has = channel < CHANNELS
    part = tl.program_id(1).to(tl.int64)
    for step in range(group * GROUP_STEPS, tl.minimum((group + 1) * GROUP_STEPS, STEPS)):
        tap_y = step // chunks
        tap_x = step % chunks * CHUNK
        sums = ()
        for _ in tl.static_range(CHUNK):
            sums = sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
        for start in range(0, part_runs, BLOCK_R):
            number = (part * part_runs + start).to(tl.int32) + tl.arange(0, BLOCK_R)[:, None]
            exists = number < runs
            image, y, x = place(number * PIXELS, exists, coords, WINDOW)
            cell, line, has_line = source_line(image, y, exists, tap_y, grid_h, grid_w, WINDOW)
            grads = ()
            for p in tl.static_range(PIXELS):
                at = (number * PIXELS + p).to(tl.int64) * CHANNELS + channel
                grads = grads + (tl.load(grad + at, mask=exists & has, other=0.0).to(tl.float32),)
            column = _first_column(x, tap_x, WINDOW) + FIRST
            for c in tl.static_range(COLUMNS):
                read = row_on_line(cell, line, has_line, column + c, grid_to_patch, grid_w, WINDOW)
                at = read.to(tl.int64) * CHANNELS + channel
                value = tl.load(source + at, mask=(read >= 0) & has, other=0.0).to(tl.float32)
                for p in tl.static_range(PIXELS):
                    if USES[c * PIXELS + p] >= 0:
                        total = sums[USES[c * PIXELS + p]] + value * grads[p]
                        sums = sums[: USES[c * PIXELS + p]] + (total,) + sums[USES[c * PIXELS + p] + 1 :]
        for k in tl.static_range(CHUNK):
            to = (part * TAPS + tap_y * WINDOW[4] + tap_x + k) * CHANNELS + channels
            tl.store(out + to, tl.sum(sums[k], 0), mask=(channels < CHANNELS) & (tap_x + k < WINDOW[4]))
