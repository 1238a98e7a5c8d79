"""Triton kernels of max pooling: an output pixel looks at the inputs of its window, and for the gradient an input pixel
at the outputs that may have chosen it.

Runs of pixels of a patch's line are computed together: each source column is loaded once for all taps and pixels that
read it. Where a transposed stride fits no run, `grads_of_chosen_rows` goes row by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.pool import configs
from spark_fast.ops.triton_launch import launch, packed, unavailable  # noqa: F401  (asked by ops.backend)
from spark_fast.ops.triton_window import (
    MOST_PIXELS,
    candidate,
    candidate_row,
    candidates,
    column_start,
    place,
    runs_of,
    source_line,
    window_constant,
)
from spark_fast.ops.window import OUTSIDE, Geometry

_OUTSIDE = tl.constexpr(OUTSIDE)


def unsupported(features, geometry: Geometry) -> str | None:
    if features.dtype == torch.float64:
        return "float64 runs in the reference"
    return None


def max_forward(features, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    (features,) = packed(features)
    rows, channels, window = geometry.rows_out, features.shape[1], window_constant(geometry)
    runs = runs_of(geometry, False, MOST_PIXELS)
    count = rows // runs["PIXELS"]

    def run(config):
        out = features.new_empty(rows, channels)
        argmax = torch.empty_like(out, dtype=torch.int16)
        launch(
            max_of_windows, _grid(count, channels, config), features, out, argmax, geometry.query.coords,
            geometry.source.grid_to_patch, count, *geometry.source.grid, CHANNELS=channels,
            KERNEL_H=geometry.window.kernel[0], WINDOW=window, **runs, **config,
        )  # fmt: skip
        return out, argmax

    case = (features.dtype, channels, geometry.window.taps, *window)
    return tuning.run("pool.max", case, rows, configs.TILES, _default(channels), run, features.device)


def max_grad_input(grad, argmax, geometry: Geometry) -> torch.Tensor:
    grad, argmax = packed(grad, argmax)
    rows, channels, window = geometry.rows_in, grad.shape[1], window_constant(geometry, transposed=True)
    runs = runs_of(geometry, True, MOST_PIXELS)
    kernel_h, (vertical, horizontal) = geometry.window.kernel[0], candidates(geometry.window)
    tables = geometry.source.coords, geometry.query.grid_to_patch

    def run(config):
        out = grad.new_empty(rows, channels)
        if runs is None:
            launch(
                grads_of_chosen_rows, _grid(rows, channels, config), grad, argmax, out, *tables, rows,
                *geometry.query.grid, CHANNELS=channels, KERNEL_H=kernel_h, VERTICAL=vertical, HORIZONTAL=horizontal,
                WINDOW=window, **config,
            )  # fmt: skip
        else:
            count = rows // runs["PIXELS"]
            launch(
                grads_of_chosen, _grid(count, channels, config), grad, argmax, out, *tables, count,
                *geometry.query.grid, CHANNELS=channels, KERNEL_H=kernel_h, LINES=vertical, WINDOW=window, **runs,
                **config,
            )  # fmt: skip
        return out

    name = "pool.max_grad_rows" if runs is None else "pool.max_grad"
    case = (grad.dtype, channels, geometry.window.taps, *window)
    return tuning.run(name, case, rows, configs.TILES, _default(channels), run, grad.device)


def _grid(count: int, channels: int, config) -> tuple[int]:
    return (triton.cdiv(count, config["BLOCK_R"]) * triton.cdiv(channels, config["BLOCK_C"]),)


def _default(channels: int) -> tuning.Config:
    """The first one that computes fewest channels in vain."""
    return min(configs.TILES, key=lambda config: triton.cdiv(channels, config["BLOCK_C"]) * config["BLOCK_C"])


@triton.jit(do_not_specialize=["runs"])
def max_of_windows(
    source,
    out,
    argmax,
    coords,
    grid_to_patch,
    runs,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    PIXELS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    USES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r] = maximum over taps t of source[row that r reads at t], argmax[r] = the first such t; the last NaN wins.

    source (source rows, CHANNELS), out (runs * PIXELS, CHANNELS), argmax like out, int16: -1 for a window wholly
    outside. FIRST, COLUMNS, CHUNK, USES, ALIGNED: see `runs_of`.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (WINDOW[4] + CHUNK - 1) // CHUNK
    number = (tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = number < runs
    has = channel < CHANNELS
    image, y, x = place(number * PIXELS, exists, coords, WINDOW)
    best, chosen, firsts = (), (), ()  # firsts: a pixel's first tap inside the image, which wins among values of -inf
    for _ in tl.static_range(PIXELS):
        best = best + (tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32),)
        chosen = chosen + (tl.full((BLOCK_R, BLOCK_C), -1, tl.int32),)
        firsts = firsts + (tl.full((BLOCK_R, 1), -1, tl.int32),)

    for step in range(KERNEL_H * chunks):
        tap_y = step // chunks
        tap_x = step % chunks * CHUNK
        cell, line, has_line = source_line(image, y, exists, tap_y, grid_h, grid_w, WINDOW)
        for c in tl.static_range(COLUMNS):
            start, offset = column_start(
                cell, line, has_line, x, tap_x, grid_to_patch, grid_w, FIRST + c, ALIGNED, WINDOW
            )  # fmt: skip
            at = start.to(tl.int64) * CHANNELS + channel + offset * CHANNELS
            unread = tl.where(start == _OUTSIDE, float("-inf"), 0.0).to(source.dtype.element_ty)  # masked pixels are 0
            value = tl.load(source + at, mask=(start >= 0) & has, other=unread).to(tl.float32)
            for p in tl.static_range(PIXELS):
                if USES[c * PIXELS + p] >= 0:
                    tap = tap_y * WINDOW[4] + tap_x + USES[c * PIXELS + p]
                    wins = (value > best[p]) | (value != value)
                    inside = start != _OUTSIDE
                    if USES[c * PIXELS + p] + CHUNK * (chunks - 1) >= WINDOW[4]:  # beyond the kernel in the last chunk
                        inside = inside & (tap_x + USES[c * PIXELS + p] < WINDOW[4])
                        wins = wins & inside
                    best = best[:p] + (tl.where(wins, value, best[p]),) + best[p + 1 :]
                    chosen = chosen[:p] + (tl.where(wins, tap, chosen[p]),) + chosen[p + 1 :]
                    first = tl.where((firsts[p] < 0) & inside, tap, firsts[p])
                    firsts = firsts[:p] + (first,) + firsts[p + 1 :]

    for p in tl.static_range(PIXELS):
        to = (number * PIXELS + p).to(tl.int64) * CHANNELS + channel
        tl.store(out + to, best[p].to(out.dtype.element_ty), mask=exists & has)
        tap = tl.where(chosen[p] < 0, firsts[p], chosen[p])
        tl.store(argmax + to, tap.to(tl.int16), mask=exists & has)


@triton.jit(do_not_specialize=["runs"])
def grads_of_chosen(
    grad,
    argmax,
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
    ALIGNED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r] = sum over taps t of grad[output row that reads r at t], where argmax there is t.

    grad and argmax (output rows, CHANNELS), out (runs * PIXELS, CHANNELS). LINES lines of taps may exist for a pixel.
    FIRST, COLUMNS, CHUNK, USES, ALIGNED: see `runs_of`.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (WINDOW[4] + CHUNK - 1) // CHUNK
    number = (tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = number < runs
    has = channel < CHANNELS
    image, y, x = place(number * PIXELS, exists, coords, WINDOW)
    sums = ()
    for _ in tl.static_range(PIXELS):
        sums = sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)

    for step in range(LINES * chunks):
        tap_y = candidate(y, step // chunks, 0, WINDOW)
        tap_x = step % chunks * CHUNK
        cell, line, has_line = source_line(image, y, exists & (tap_y < KERNEL_H), tap_y, grid_h, grid_w, WINDOW)
        for c in tl.static_range(COLUMNS):
            start, offset = column_start(
                cell, line, has_line, x, tap_x, grid_to_patch, grid_w, FIRST + c, ALIGNED, WINDOW
            )  # fmt: skip
            at = start.to(tl.int64) * CHANNELS + channel + offset * CHANNELS
            reads = (start >= 0) & has
            winner = tl.load(argmax + at, mask=reads, other=-1).to(tl.int32)
            value = tl.load(grad + at, mask=reads, other=0.0).to(tl.float32)
            for p in tl.static_range(PIXELS):
                if USES[c * PIXELS + p] >= 0:
                    won = winner == tap_y * WINDOW[4] + tap_x + USES[c * PIXELS + p]
                    if USES[c * PIXELS + p] + CHUNK * (chunks - 1) >= WINDOW[4]:  # the number of a tap of the next line
                        won = won & (tap_x + USES[c * PIXELS + p] < WINDOW[4])
                    sums = sums[:p] + (sums[p] + tl.where(won, value, 0.0),) + sums[p + 1 :]

    for p in tl.static_range(PIXELS):
        to = (number * PIXELS + p).to(tl.int64) * CHANNELS + channel
        tl.store(out + to, sums[p].to(out.dtype.element_ty), mask=exists & has)


@triton.jit(do_not_specialize=["rows"])
def grads_of_chosen_rows(
    grad,
    argmax,
    out,
    coords,
    grid_to_patch,
    rows,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    VERTICAL: tl.constexpr,
    HORIZONTAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As `grads_of_chosen`, row by row: VERTICAL x HORIZONTAL taps may exist for a pixel."""
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = row < rows
    has = channel < CHANNELS
    image, y, x = place(row, exists, coords, WINDOW)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for number in range(VERTICAL * HORIZONTAL):
        tap, read = candidate_row(
            image, y, x, exists, number, grid_to_patch, grid_h, grid_w, KERNEL_H, HORIZONTAL, WINDOW
        )  # fmt: skip
        at = read.to(tl.int64) * CHANNELS + channel
        reads = (read >= 0) & has
        won = tl.load(argmax + at, mask=reads, other=-1) == tap
        value = tl.load(grad + at, mask=reads, other=0.0).to(tl.float32)
        sums += tl.where(won, value, 0.0)
    tl.store(out + row.to(tl.int64) * CHANNELS + channel, sums.to(out.dtype.element_ty), mask=exists & has)
