"""Triton kernels of the convolution: output-stationary gather and matrix product in one, without atomics.

One kernel serves forward and grad-input (the transposed gather), one the weight's gradient. Where many taps of a row
are masked or do not exist, rows are sorted by the set of taps that they have, and a tile runs its own taps only
(`schedule`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.conv import configs
from spark_fast.ops.triton_launch import (
    dot_constants,
    is_recording,
    launch,
    packed,
    unavailable,  # noqa: F401  (asked by ops.backend)
)
from spark_fast.ops.triton_window import place, source_row, window_constant
from spark_fast.ops.window import Geometry

PROGRAMS = 512  # of a weight gradient: enough to fill any GPU; a fixed number, so that sums do not depend on the GPU
LEAST_PART = 512  # rows
MOST_UNFOLDED = 8  # input channels up to which taps and channels are one depth
MOST_SORTED = 62  # taps that fit a row's bit mask


def unsupported(features, weight, geometry: Geometry, groups: int) -> str | None:
    if features.dtype == torch.float64:
        return "float64 has no tensor cores to gain from; PyTorch's library runs it"
    if geometry.source is geometry.query and geometry.source.grid == (1, 1) and geometry.source.per_image == 1:
        return "nothing is masked; cuDNN runs dense maps"
    return None


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    return _gather(features, weight, bias, geometry, groups, transposed=False)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    return _gather(grad, weight, None, geometry, groups, transposed=True)


def _gather(source, weight, bias, geometry: Geometry, groups: int, transposed: bool) -> torch.Tensor:
    source, bias = packed(source, bias)
    channels, width = (
        (weight.shape[0] // groups, weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0] // groups)
    )
    taps = geometry.window.taps
    # (O, C / groups, kh, kw) -> (taps, groups, depth, width)
    kernel = weight.reshape(groups, -1, weight.shape[1], taps).permute(3, 0, 1, 2)
    kernel = packed(kernel if transposed else kernel.transpose(2, 3))[0]
    query, reads = (geometry.source, geometry.query) if transposed else (geometry.query, geometry.source)
    rows = geometry.rows_in if transposed else geometry.rows_out
    window = window_constant(geometry, transposed)
    unfold = channels <= MOST_UNFOLDED and taps > 1
    dots = dot_constants()
    choices = configs.gather_configs(source.dtype, dots["PRECISION"], unfold)

    def run(config):
        out = source.new_empty(rows, groups * width)
        block = config["BLOCK_M"]
        plan = (None,) * 4
        if _sorted(geometry, transposed) and not unfold:
            plan = schedule(geometry, transposed, block)
        grid = (triton.cdiv(rows, block) * triton.cdiv(width, config["BLOCK_N"]), groups)
        launch(
            gather_gemm, grid, source, kernel, bias, out, query.coords, reads.grid_to_patch, *plan, rows,
            *reads.grid, CHANNELS=channels, WIDTH=width, GROUPS=groups, TAPS=taps, UNFOLD=unfold,
            WINDOW=window, **dots, **config,
        )  # fmt: skip
        return out

    case = (source.dtype, channels, width, groups, taps, *window, dots["PRECISION"])
    return tuning.run("conv.gather", case, rows, choices, _default_gather(choices, width), run, source.device)


def _default_gather(choices, width: int):
    """The narrowest for few output channels, the second, which is wider, for many."""
    if len(choices) == 1 or 16 < width <= 64:
        return choices[0]
    return choices[-1] if width <= 16 else choices[1]


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    grad, features = packed(grad, features)
    channels, width, taps, rows = weight.shape[1], weight.shape[0] // groups, geometry.window.taps, geometry.rows_out
    window = window_constant(geometry)
    unfold = channels <= MOST_UNFOLDED and taps > 1
    dots = dot_constants()
    choices = configs.outer_configs(features.dtype, dots["PRECISION"], unfold)

    def run(config):
        depth = taps * channels if unfold else channels
        tiles = triton.cdiv(depth, config["BLOCK_C"]) * triton.cdiv(width, config["BLOCK_N"]) * (1 if unfold else taps)
        parts = max(1, min(triton.cdiv(PROGRAMS, tiles * groups), triton.cdiv(rows, LEAST_PART)))
        block = config["BLOCK_R"]
        part_rows = triton.cdiv(triton.cdiv(rows, parts), block) * block
        sums = features.new_empty(parts, taps, groups, channels, width, dtype=torch.float32)
        launch(
            outer_product, (tiles, parts, groups), features, grad, sums, geometry.query.coords,
            geometry.source.grid_to_patch, rows, part_rows, *geometry.source.grid, CHANNELS=channels, WIDTH=width,
            GROUPS=groups, TAPS=taps, UNFOLD=unfold, WINDOW=window, **dots, **config,
        )  # fmt: skip
        total = sums[0] if parts == 1 else sums.sum(0)  # (taps, groups, C, O), in a fixed order
        return total.permute(1, 3, 2, 0).reshape(weight.shape).to(weight.dtype)

    narrow = width <= 16 or (channels <= 16 and not unfold)
    default = choices[-1] if narrow else choices[0]
    case = (features.dtype, channels, width, groups, taps, *window, dots["PRECISION"])
    return tuning.run("conv.outer", case, rows, choices, default, run, features.device)


def _sorted(geometry: Geometry, transposed: bool) -> bool:
    """Do rows differ so much in the taps they have that sorting them pays?"""
    window = geometry.window
    if not 1 < window.taps <= MOST_SORTED:
        return False
    return (transposed and window.stride != (1, 1)) or max(geometry.patch_in if transposed else geometry.patch_out) <= 2


def schedule(geometry: Geometry, transposed: bool, block: int) -> tuple[torch.Tensor, ...]:
    """The rows sorted by the set of taps that they have, and what each tile of `block` of them reads.

    Made once per batch and window: it is kept with the patches.

    Returns:
        int32: order (rows,), counts (tiles,), lists (tiles, taps), sources (tiles, taps, block). Tile i needs the taps
        lists[i, :counts[i]]; its row j reads sources[i, n, j] at tap lists[i, n], negative where nothing.
    """
    patches = geometry.source
    query = None if geometry.query is patches else geometry.query  # patches that hold themselves are not freed at once
    key = ("schedule", query, geometry.window, geometry.size_in, geometry.size_out, transposed, block)
    if is_recording():  # no kernel runs that would fill the tables
        return _schedule(geometry, transposed, block)
    if key not in patches.derived:
        patches.derived[key] = _schedule(geometry, transposed, block)
    return patches.derived[key]


def _schedule(geometry: Geometry, transposed: bool, block: int) -> tuple[torch.Tensor, ...]:
    query, reads = (geometry.source, geometry.query) if transposed else (geometry.query, geometry.source)
    rows, taps = geometry.rows_in if transposed else geometry.rows_out, geometry.window.taps
    tiles, window = triton.cdiv(rows, block), window_constant(geometry, transposed)
    masks = torch.empty(rows, dtype=torch.int64, device=query.device)
    launch(
        tap_masks, (triton.cdiv(rows, 256),), masks, query.coords, reads.grid_to_patch, rows, *reads.grid, TAPS=taps,
        BLOCK=256, WINDOW=window,
    )  # fmt: skip
    masks, order = torch.sort(masks, stable=True)
    masks = torch.nn.functional.pad(masks, (0, tiles * block - rows)).view(tiles, block, 1)
    has = (masks.bitwise_right_shift(torch.arange(taps, device=masks.device)) & 1).amax(1)  # (tiles, taps)
    lists = torch.sort(has, dim=1, descending=True, stable=True).indices.to(torch.int32)
    order, counts = order.to(torch.int32), has.sum(1, dtype=torch.int32)
    sources = torch.empty(tiles, taps, block, dtype=torch.int32, device=query.device)
    launch(
        schedule_sources, (tiles, taps), sources, query.coords, reads.grid_to_patch, order, lists, rows, *reads.grid,
        TAPS=taps, BLOCK=block, WINDOW=window,
    )  # fmt: skip
    return order, counts, lists, sources


@triton.jit(do_not_specialize=["rows"])
def tap_masks(
    masks,
    coords,
    grid_to_patch,
    rows,
    grid_h,
    grid_w,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """masks (rows,) int64: bit t is set where the row has a source at tap t."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    image, y, x = place(row, exists, coords, WINDOW)
    mask = tl.zeros((BLOCK,), tl.int64)
    for tap in range(TAPS):
        source = source_row(
            image, y, x, exists, tap, grid_to_patch, grid_h, grid_w, WINDOW,
        )  # fmt: skip
        mask |= (source >= 0).to(tl.int64) << tap
    tl.store(masks + row, mask, mask=exists)


@triton.jit(do_not_specialize=["rows"])
def schedule_sources(
    sources,
    coords,
    grid_to_patch,
    order,
    lists,
    rows,
    grid_h,
    grid_w,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """sources (tiles, TAPS, BLOCK): what a tile's rows, in `order`, read at its list's taps. Grid: (tiles, TAPS)."""
    slot = tl.program_id(0).to(tl.int64) * TAPS + tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < rows
    image, y, x = place(tl.load(order + at, mask=exists, other=0), exists, coords, WINDOW)
    read = source_row(image, y, x, exists, tl.load(lists + slot), grid_to_patch, grid_h, grid_w, WINDOW)
    tl.store(sources + slot * BLOCK + tl.arange(0, BLOCK), read)


@triton.jit(do_not_specialize=["rows"])
def gather_gemm(
    source,
    kernel,
    bias,
    out,
    coords,
    grid_to_patch,
    order,
    counts,
    lists,
    sources,
    rows,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    UNFOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[r] = bias + sum over taps t of source[row that r reads at t] @ kernel[t].

    source (source rows, GROUPS * CHANNELS), kernel (TAPS, GROUPS, CHANNELS, WIDTH), bias (GROUPS * WIDTH,) or None, out
    (rows, GROUPS * WIDTH). Grid: (tiles of rows * tiles of WIDTH, GROUPS). With `order` the rows are taken in that
    order, and a tile reads by its part of `schedule`. UNFOLD: depth is (tap, channel) together.
    """
    blocks_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // blocks_n
    group = tl.program_id(1)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    if order is not None:
        row = tl.load(order + row, mask=exists, other=0)
    else:
        image, y, x = place(row, exists, coords, WINDOW)
    column = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    blocks_k: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    if UNFOLD:
        steps = (TAPS * CHANNELS + BLOCK_K - 1) // BLOCK_K
    elif order is not None:
        steps = tl.load(counts + tile) * blocks_k
    else:
        steps = TAPS * blocks_k
    for step in range(steps):
        if UNFOLD:
            k = step * BLOCK_K + depth
            tap = k // CHANNELS
            channel = k % CHANNELS
            has = tap < TAPS
            read = source_row(
                image[:, None], y[:, None], x[:, None], exists[:, None] & has[None, :], tap[None, :], grid_to_patch,
                grid_h, grid_w, WINDOW,
            )  # fmt: skip
        else:
            channel = step % blocks_k * BLOCK_K + depth
            has = channel < CHANNELS
            if order is not None:
                slot = tile.to(tl.int64) * TAPS + step // blocks_k
                tap = tl.load(lists + slot)
                read = tl.load(sources + slot * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
            else:
                tap = step // blocks_k
                read = source_row(image, y, x, exists, tap, grid_to_patch, grid_h, grid_w, WINDOW)[:, None]
        at = read.to(tl.int64) * (GROUPS * CHANNELS) + (group * CHANNELS + channel)[None, :]
        a = tl.load(source + at, mask=(read >= 0) & has[None, :], other=0.0)
        at_kernel = ((tap * GROUPS + group) * CHANNELS + channel)[:, None] * WIDTH + column[None, :]
        b = tl.load(kernel + at_kernel, mask=has[:, None] & (column < WIDTH)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)

    writes = exists[:, None] & (column < WIDTH)[None, :]
    if bias is not None:
        sums += tl.load(bias + group * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    to = row.to(tl.int64)[:, None] * (GROUPS * WIDTH) + (group * WIDTH + column)[None, :]
    tl.store(out + to, sums.to(out.dtype.element_ty), mask=writes)


@triton.jit(do_not_specialize=["rows", "part_rows"])
def outer_product(
    source,
    grad,
    out,
    coords,
    grid_to_patch,
    rows,
    part_rows,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    UNFOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[p, t] = sum over the rows r of part p of outer(source[row that r reads at tap t], grad[r]).

    source (source rows, GROUPS * CHANNELS), grad (rows, GROUPS * WIDTH), out (parts, TAPS, GROUPS, CHANNELS, WIDTH)
    float32. Grid: (tiles of an outer product, taps outermost; parts; GROUPS). UNFOLD: the first side is (tap, channel)
    together.
    """
    blocks_n: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0)
    part = tl.program_id(1)
    group = tl.program_id(2)
    column = tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if UNFOLD:
        k = tile // blocks_n * BLOCK_C + tl.arange(0, BLOCK_C)
        tap = k // CHANNELS
        channel = k % CHANNELS
        has = tap < TAPS
    else:
        tap = tile // (blocks_n * blocks_c)
        channel = tile // blocks_n % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        has = channel < CHANNELS
    sums = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    first = part.to(tl.int64) * part_rows
    for start in range(0, part_rows, BLOCK_R):
        row = (first + start).to(tl.int32) + tl.arange(0, BLOCK_R)
        exists = row < rows
        image, y, x = place(row, exists, coords, WINDOW)
        if UNFOLD:
            read = source_row(
                image[:, None], y[:, None], x[:, None], exists[:, None] & has[None, :], tap[None, :], grid_to_patch,
                grid_h, grid_w, WINDOW,
            )  # fmt: skip
        else:
            read = source_row(
                image, y, x, exists, tap, grid_to_patch, grid_h, grid_w, WINDOW,
            )[:, None]  # fmt: skip
        at = read.to(tl.int64) * (GROUPS * CHANNELS) + (group * CHANNELS + channel)[None, :]
        a = tl.load(source + at, mask=(read >= 0) & has[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
        at_grad = row.to(tl.int64)[:, None] * (GROUPS * WIDTH) + (group * WIDTH + column)[None, :]
        b = tl.load(grad + at_grad, mask=exists[:, None] & (column < WIDTH)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
    if UNFOLD:
        slot = tap * (GROUPS * CHANNELS) + group * CHANNELS + channel
    else:
        slot = (tap * GROUPS + group) * CHANNELS + channel
    to = part.to(tl.int64) * (TAPS * GROUPS * CHANNELS * WIDTH) + slot[:, None] * WIDTH + column[None, :]
    tl.store(out + to, sums, mask=has[:, None] & (column < WIDTH)[None, :])
