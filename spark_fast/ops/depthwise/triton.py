"""Triton kernels of the depthwise convolution, without atomics.

Runs of pixels of a patch's line are computed together: each source column is loaded once for all taps and pixels that
read it. `gather_lines` serves forward and grad-input (the transposed gather), `product_lines` the weight's gradient, in
parts that are added in order. Where a transposed stride fits no run, `gather_rows` goes row by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.depthwise import configs
from spark_fast.ops.triton_launch import launch, packed, unavailable  # noqa: F401  (asked by ops.backend)
from spark_fast.ops.triton_window import (
    candidate,
    candidate_row,
    candidates,
    column_start,
    place,
    runs_of,
    source_line,
    window_constant,
)
from spark_fast.ops.window import Geometry

MOST_UNALIGNED = 4  # pixels of a run whose columns move within patches: their addresses need registers too
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
    source, bias = packed(source, bias)
    channels, taps = source.shape[1], geometry.window.taps
    weight = weight.new_empty(taps, channels, dtype=torch.float32).copy_(weight.reshape(channels, taps).t())
    query, reads = (geometry.source, geometry.query) if transposed else (geometry.query, geometry.source)
    rows = geometry.rows_in if transposed else geometry.rows_out
    window = window_constant(geometry, transposed)
    runs = runs_of(geometry, transposed, MOST_UNALIGNED)
    kernel_h, (vertical, horizontal) = geometry.window.kernel[0], candidates(geometry.window)
    tables = query.coords, reads.grid_to_patch

    def run(config):
        out = source.new_empty(rows, channels)
        blocks = triton.cdiv(channels, config["BLOCK_C"])
        if runs is None:
            launch(
                gather_rows, (triton.cdiv(rows, config["BLOCK_R"]) * blocks,), source, weight, out, *tables, rows,
                *reads.grid, CHANNELS=channels, KERNEL_H=kernel_h, VERTICAL=vertical, HORIZONTAL=horizontal,
                WINDOW=window, **config,
            )  # fmt: skip
        else:
            count = rows // runs["PIXELS"]
            launch(
                gather_lines, (triton.cdiv(count, config["BLOCK_R"]) * blocks,), source, weight, bias, out, *tables,
                count, *reads.grid, CHANNELS=channels, KERNEL_H=kernel_h, LINES=vertical if transposed else kernel_h,
                WINDOW=window, **runs, **config,
            )  # fmt: skip
        return out

    name = "depthwise.rows" if runs is None else "depthwise.lines"
    case = (source.dtype, channels, taps, *window)
    choices = configs.GATHER
    return tuning.run(name, case, rows, choices, _default(choices, channels), run, source.device)


def grad_weight(grad, features, geometry: Geometry, weight) -> torch.Tensor:
    grad, features = packed(grad, features)
    channels, taps, rows = features.shape[1], geometry.window.taps, geometry.rows_out
    window = window_constant(geometry)
    runs = runs_of(geometry, False, MOST_UNALIGNED)
    count = rows // runs["PIXELS"]
    steps = geometry.window.kernel[0] * triton.cdiv(geometry.window.kernel[1], runs["CHUNK"])
    groups = triton.cdiv(steps, MOST_STEPS)

    def run(config):
        blocks, block = triton.cdiv(channels, config["BLOCK_C"]), config["BLOCK_R"]
        parts = max(1, min(triton.cdiv(PROGRAMS, groups * blocks), triton.cdiv(count, LEAST_PART)))
        part_runs = triton.cdiv(triton.cdiv(count, parts), block) * block
        sums = features.new_empty(parts, taps, channels, dtype=torch.float32)
        launch(
            product_lines, (groups * blocks, parts), features, grad, sums, geometry.query.coords,
            geometry.source.grid_to_patch, count, part_runs, *geometry.source.grid, CHANNELS=channels, TAPS=taps,
            STEPS=steps, GROUP_STEPS=triton.cdiv(steps, groups), WINDOW=window, **runs, **config,
        )  # fmt: skip
        total = sums[0] if parts == 1 else sums.sum(0)  # (taps, C), in a fixed order
        return total.t().reshape(weight.shape).to(weight.dtype)

    case = (features.dtype, channels, taps, *window)
    choices = configs.product_configs(features.dtype)
    return tuning.run("depthwise.product", case, rows, choices, _default(choices, channels), run, features.device)


def _default(choices: list[tuning.Config], channels: int) -> tuning.Config:
    """The first one that computes fewest channels in vain."""
    return min(choices, key=lambda config: triton.cdiv(channels, config["BLOCK_C"]) * config["BLOCK_C"])


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
    ALIGNED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r] = bias + sum over taps t of source[row that r reads at t] * weight[t], for runs of PIXELS rows.

    source (source rows, CHANNELS), weight (taps, CHANNELS) float32, bias (CHANNELS,) or None, out (runs * PIXELS,
    CHANNELS). LINES lines of taps may exist for a pixel. FIRST, COLUMNS, CHUNK, USES: see `runs_of`.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (WINDOW[4] + CHUNK - 1) // CHUNK
    number = (tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = number < runs
    has = channel < CHANNELS
    image, y, x = place(number * PIXELS, exists, coords, WINDOW)
    none = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if bias is not None:
        none += tl.load(bias + channel, mask=has, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(PIXELS):
        sums = sums + (none,)

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
        for c in tl.static_range(COLUMNS):
            start, offset = column_start(
                cell, line, has_line, x, tap_x, grid_to_patch, grid_w, FIRST + c, ALIGNED, WINDOW
            )  # fmt: skip
            at = start.to(tl.int64) * CHANNELS + channel + offset * CHANNELS
            value = tl.load(source + at, mask=(start >= 0) & has, other=0.0).to(tl.float32)
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
    grad,
    weight,
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
    """out[r] = sum over taps t of grad[output row that reads r at t] * weight[t].

    grad (output rows, CHANNELS), weight (taps, CHANNELS) float32, out (rows, CHANNELS). VERTICAL x HORIZONTAL taps may
    exist for a pixel.
    """
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
        value = tl.load(grad + at, mask=reads, other=0.0).to(tl.float32)
        sums += value * tl.load(weight + tap * CHANNELS + channel, mask=reads, other=0.0)
    tl.store(out + row.to(tl.int64) * CHANNELS + channel, sums.to(out.dtype.element_ty), mask=exists & has)


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
    ALIGNED: tl.constexpr,
    TAPS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[p, t] = sum over the rows r of part p of source[row that r reads at tap t] * grad[r].

    source (source rows, CHANNELS), grad (runs * PIXELS, CHANNELS), out (parts, TAPS, CHANNELS) float32. Grid: (groups
    of steps * blocks of channels, parts); a step is a line of taps or a chunk of one. FIRST, COLUMNS, CHUNK, USES: see
    `runs_of`.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    chunks: tl.constexpr = (WINDOW[4] + CHUNK - 1) // CHUNK
    group = tl.program_id(0) // blocks_c
    channels = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = channels[None, :]
    has = channel < CHANNELS
    part = tl.program_id(1).to(tl.int64)
    for nth in range(GROUP_STEPS):
        step = group * GROUP_STEPS + nth
        tap_y = step // chunks
        tap_x = step % chunks * CHUNK
        sums = ()
        for _ in tl.static_range(CHUNK):
            sums = sums + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
        for done in range(0, part_runs, BLOCK_R):
            number = (part * part_runs + done).to(tl.int32) + tl.arange(0, BLOCK_R)[:, None]
            exists = number < runs
            image, y, x = place(number * PIXELS, exists, coords, WINDOW)
            cell, line, has_line = source_line(image, y, exists, tap_y, grid_h, grid_w, WINDOW)
            grads = ()
            for p in tl.static_range(PIXELS):
                at = (number * PIXELS + p).to(tl.int64) * CHANNELS + channel
                grads = grads + (tl.load(grad + at, mask=exists & has, other=0.0).to(tl.float32),)
            for c in tl.static_range(COLUMNS):
                start, offset = column_start(
                    cell, line, has_line, x, tap_x, grid_to_patch, grid_w, FIRST + c, ALIGNED, WINDOW
                )  # fmt: skip
                at = start.to(tl.int64) * CHANNELS + channel + offset * CHANNELS
                value = tl.load(source + at, mask=(start >= 0) & has, other=0.0).to(tl.float32)
                for p in tl.static_range(PIXELS):
                    if USES[c * PIXELS + p] >= 0:
                        total = sums[USES[c * PIXELS + p]] + value * grads[p]
                        sums = sums[: USES[c * PIXELS + p]] + (total,) + sums[USES[c * PIXELS + p] + 1 :]
        for k in tl.static_range(CHUNK):
            to = (part * TAPS + tap_y * WINDOW[4] + tap_x + k) * CHANNELS + channels
            is_tap = (step < STEPS) & (tap_x + k < WINDOW[4])
            tl.store(out + to, tl.sum(sums[k], 0), mask=is_tap & (channels < CHANNELS))
