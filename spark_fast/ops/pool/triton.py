"""Triton kernels of max pooling: an output pixel looks at the inputs of its window, and for the gradient an input pixel
at the outputs that may have chosen it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.pool import configs
from spark_fast.ops.triton_launch import launch, unavailable  # noqa: F401  (asked by ops.backend)
from spark_fast.ops.triton_window import candidate_row, candidates, place, source_row, window_constant
from spark_fast.ops.window import OUTSIDE, Geometry

_OUTSIDE = tl.constexpr(OUTSIDE)
MOST_UNROLLED = 9  # taps up to which the loop over them is unrolled: what taps of a line share is computed once


def unsupported(features, geometry: Geometry) -> str | None:
    if features.dtype == torch.float64:
        return "float64 runs in the reference"
    return None


def max_forward(features, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    features = features.contiguous()
    rows, channels, window = geometry.rows_out, features.shape[1], window_constant(geometry)

    def run(config):
        out = features.new_empty(rows, channels)
        argmax = torch.empty_like(out, dtype=torch.int16)
        launch(
            max_of_windows, _grid(rows, channels, config), features, out, argmax, geometry.query.coords,
            geometry.source.grid_to_patch, rows, *geometry.source.grid, CHANNELS=channels, TAPS=geometry.window.taps,
            UNROLL=geometry.window.taps <= MOST_UNROLLED, WINDOW=window, **config,
        )  # fmt: skip
        return out, argmax

    case = (features.dtype, channels, geometry.window.taps, *window)
    return tuning.run("pool.max", case, rows, configs.TILES, _default(channels), run, features.device)


def max_grad_input(grad, argmax, geometry: Geometry) -> torch.Tensor:
    grad = grad.contiguous()
    rows, channels, window = geometry.rows_in, grad.shape[1], window_constant(geometry, transposed=True)
    vertical, horizontal = candidates(geometry.window)

    def run(config):
        out = grad.new_empty(rows, channels)
        launch(
            grads_of_chosen, _grid(rows, channels, config), grad, argmax, out, geometry.source.coords,
            geometry.query.grid_to_patch, rows, *geometry.query.grid, CHANNELS=channels,
            KERNEL_H=geometry.window.kernel[0], VERTICAL=vertical, HORIZONTAL=horizontal,
            UNROLL=vertical * horizontal <= MOST_UNROLLED, WINDOW=window, **config,
        )  # fmt: skip
        return out

    case = (grad.dtype, channels, geometry.window.taps, *window)
    return tuning.run("pool.max_grad", case, rows, configs.TILES, _default(channels), run, grad.device)


def _grid(rows: int, channels: int, config) -> tuple[int]:
    return (triton.cdiv(rows, config["BLOCK_R"]) * triton.cdiv(channels, config["BLOCK_C"]),)


def _default(channels: int):
    return configs.TILES[0] if channels > 32 else configs.TILES[3]


@triton.jit
def _greater(
    best,
    argmax,
    source,
    image,
    y,
    x,
    exists,
    tap,
    channel,
    grid_to_patch,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Maximum and its tap with one more tap: NaN wins, masked pixels are 0, pixels outside do not take part."""
    read = source_row(image, y, x, exists, tap, grid_to_patch, grid_h, grid_w, WINDOW)
    at = read.to(tl.int64) * CHANNELS + channel
    value = tl.load(source + at, mask=(read >= 0) & (channel < CHANNELS), other=0.0).to(tl.float32)
    wins = (read != _OUTSIDE) & ((value > best) | (value != value) | (argmax < 0))
    return tl.where(wins, value, best), tl.where(wins, tap, argmax)


@triton.jit(do_not_specialize=["rows"])
def max_of_windows(
    source,
    out,
    argmax,
    coords,
    grid_to_patch,
    rows,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r] = maximum over taps t of source[row that r reads at t], argmax[r] = the first such t.

    source (source rows, CHANNELS), out (rows, CHANNELS), argmax like out, int16: -1 for a window wholly outside.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = row < rows
    image, y, x = place(row, exists, coords, WINDOW)
    best = tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK_R, BLOCK_C), -1, tl.int32)
    if UNROLL:
        for tap in tl.static_range(TAPS):
            best, chosen = _greater(
                best, chosen, source, image, y, x, exists, tap, channel, grid_to_patch, grid_h, grid_w, CHANNELS, WINDOW
            )  # fmt: skip
    else:
        for tap in range(TAPS):
            best, chosen = _greater(
                best, chosen, source, image, y, x, exists, tap, channel, grid_to_patch, grid_h, grid_w, CHANNELS, WINDOW
            )  # fmt: skip
    to = row.to(tl.int64) * CHANNELS + channel
    writes = exists & (channel < CHANNELS)
    tl.store(out + to, best.to(out.dtype.element_ty), mask=writes)
    tl.store(argmax + to, chosen.to(tl.int16), mask=writes)


@triton.jit
def _add_if_chosen(
    sums,
    grad,
    argmax,
    image,
    y,
    x,
    exists,
    number,
    channel,
    grid_to_patch,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    HORIZONTAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """`sums` and the gradient of the output that reads the pixel through its number-th tap, where that tap won."""
    tap, read = candidate_row(
        image, y, x, exists, number, grid_to_patch, grid_h, grid_w, KERNEL_H, HORIZONTAL, WINDOW
    )  # fmt: skip
    at = read.to(tl.int64) * CHANNELS + channel
    reads = (read >= 0) & (channel < CHANNELS)
    won = tl.load(argmax + at, mask=reads, other=-1) == tap
    value = tl.load(grad + at, mask=reads, other=0.0).to(tl.float32)
    return sums + tl.where(won, value, 0.0)


@triton.jit(do_not_specialize=["rows"])
def grads_of_chosen(
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
    UNROLL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r] = sum over taps t of grad[output row that reads r at t], where argmax there is t.

    grad and argmax (output rows, CHANNELS), out (rows, CHANNELS). VERTICAL x HORIZONTAL taps may exist for a pixel.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    channel = (tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    exists = row < rows
    image, y, x = place(row, exists, coords, WINDOW)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if UNROLL:
        for number in tl.static_range(VERTICAL * HORIZONTAL):
            sums = _add_if_chosen(
                sums, grad, argmax, image, y, x, exists, number, channel, grid_to_patch, grid_h, grid_w, CHANNELS,
                KERNEL_H, HORIZONTAL, WINDOW,
            )  # fmt: skip
    else:
        for number in range(VERTICAL * HORIZONTAL):
            sums = _add_if_chosen(
                sums, grad, argmax, image, y, x, exists, number, channel, grid_to_patch, grid_h, grid_w, CHANNELS,
                KERNEL_H, HORIZONTAL, WINDOW,
            )  # fmt: skip
    to = row.to(tl.int64) * CHANNELS + channel
    tl.store(out + to, sums.to(out.dtype.element_ty), mask=exists & (channel < CHANNELS))
