"""Triton kernels between dense maps and packed rows: bit copies, each value of the result written once; and the sum
over masked pixels, in parts that are added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import checks, tuning
from spark_fast.ops.densify import configs
from spark_fast.ops.triton_launch import launch, packed, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.triton_window import pixel_row
from spark_fast.patches import ActivePatches

PROGRAMS = 1024  # that sum over pixels: enough to fill any GPU; a fixed number, so that sums do not depend on the GPU
LEAST_TILES = 4  # of a part


def unsupported(tensor: torch.Tensor, patches: ActivePatches, side: int | None = None) -> str | None:
    return None if tensor.dtype in checks.FLOATS else f"{tensor.dtype} runs on PyTorch's library"


def gather(images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """Rows (P * side * side, C) of the active patches of images (B, C, gh * side, gw * side), any strides."""
    images = images.resolve_neg()
    channels, side = images.shape[1], images.shape[2] // patches.grid[0]

    def run(config):
        rows = images.new_empty(patches.rows(side), channels)
        tile = _tile(config, channels)
        launch(
            gather_rows, (_tiles(*rows.shape, tile),), images, rows, patches.coords, rows.shape[0], *images.stride(),
            CHANNELS=channels, SIDE=side, **tile,
        )  # fmt: skip
        return rows

    case = (images.dtype, channels, side, "first" if images.stride(1) == 1 else "plane")
    return _tuned("densify.gather", case, patches.rows(side), run, images.device)


def scatter(features: torch.Tensor, patches: ActivePatches, side: int, fill: torch.Tensor | None) -> torch.Tensor:
    """Channels-last (B, C, gh * side, gw * side): features (P * side * side, C) where active, else fill (C,) or 0."""
    features, fill = packed(features, fill)
    (gh, gw), channels = patches.grid, features.shape[1]
    pixels = patches.batch * gh * gw * side * side

    def run(config):
        dense = features.new_empty(patches.batch, gh * side, gw * side, channels)
        tile = _tile(config, channels)
        launch(
            scatter_rows, (_tiles(pixels, channels, tile),), features, fill, dense, patches.grid_to_patch, pixels, gw,
            CHANNELS=channels, SIDE=side, **tile,
        )  # fmt: skip
        return dense.permute(0, 3, 1, 2)

    return _tuned("densify.scatter", (features.dtype, channels, side), pixels, run, features.device)


def sum_masked(maps: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """Sum (C,) over the masked pixels of maps (B, C, gh * side, gw * side); other pixels are not read."""
    (rows,) = packed(maps.permute(0, 2, 3, 1))
    (gh, gw), channels = patches.grid, rows.shape[3]
    side = rows.shape[1] // gh
    pixels = patches.batch * gh * gw * side * side

    def run(config):
        tile = _tile(config, channels)
        columns = triton.cdiv(channels, tile["BLOCK_C"])
        tiles = triton.cdiv(pixels, tile["BLOCK_R"])
        parts = min(triton.cdiv(PROGRAMS, max(columns, 1)), triton.cdiv(tiles, LEAST_TILES))
        partial = rows.new_empty(parts, channels, dtype=torch.promote_types(rows.dtype, torch.float32))
        launch(
            masked_sums, (parts * columns,), rows, partial, patches.grid_to_patch, pixels, parts, gw,
            CHANNELS=channels, SIDE=side, **tile,
        )  # fmt: skip
        return partial.sum(0).to(maps.dtype)

    return _tuned("densify.sum_masked", (rows.dtype, channels, side), pixels, run, rows.device)


def _tuned(kernel: str, case: tuple, rows: int, run, device: torch.device):
    return tuning.run(kernel, case, rows, configs.COPY, configs.COPY[0], run, device)


def _tile(config, channels: int) -> dict[str, int]:
    block = min(config["BLOCK_C"], triton.next_power_of_2(max(channels, 1)))
    return {"BLOCK_R": config["TILE"] // block, "BLOCK_C": block, "num_warps": config["num_warps"]}


def _tiles(rows: int, channels: int, tile: dict[str, int]) -> int:
    return triton.cdiv(rows, tile["BLOCK_R"]) * triton.cdiv(channels, tile["BLOCK_C"])


@triton.jit(do_not_specialize=["count"])
def gather_rows(
    images,
    rows,
    coords,
    count,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """rows (count, C) = the pixels of the patches at coords (patches, 3). Grid: (tiles of rows * tiles of C,)."""
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    column = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    present = row < count
    exists = present[:, None] & (column < CHANNELS)[None, :]
    patch, inside = row // (SIDE * SIDE), row % (SIDE * SIDE)
    image = tl.load(coords + 3 * patch, mask=present, other=0).to(tl.int64)
    y = tl.load(coords + 3 * patch + 1, mask=present, other=0) * SIDE + inside // SIDE
    x = tl.load(coords + 3 * patch + 2, mask=present, other=0) * SIDE + inside % SIDE
    pixel = image * stride_b + y * stride_y + x * stride_x
    values = tl.load(images + pixel[:, None] + column.to(tl.int64)[None, :] * stride_c, mask=exists)
    tl.store(rows + row[:, None] * CHANNELS + column[None, :], values, mask=exists)


@triton.jit(do_not_specialize=["pixels"])
def scatter_rows(
    features,
    fill,
    dense,
    grid_to_patch,
    pixels,
    grid_w,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dense (pixels, C) = the pixel's row of `features` where its patch is active, else fill (C,) or, None, 0.

    grid_to_patch (B, grid rows, grid_w) int32. Grid: (tiles of pixels * tiles of C,).
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pixel = tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    column = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    present = pixel < pixels
    row = pixel_row(pixel, present, grid_to_patch, grid_w, SIDE)
    inside = (column < CHANNELS)[None, :]
    active = row[:, None] >= 0
    at = features + row[:, None] * CHANNELS + column[None, :]
    if fill is None:
        values = tl.load(at, mask=active & inside, other=0.0)
    else:
        filling = tl.load(fill + column[None, :], mask=inside, other=0.0)
        values = tl.where(active, tl.load(at, mask=active & inside, other=0.0), filling)
    tl.store(dense + pixel[:, None] * CHANNELS + column[None, :], values, mask=present[:, None] & inside)


@triton.jit(do_not_specialize=["pixels", "parts"])
def masked_sums(
    maps,
    partial,
    grid_to_patch,
    pixels,
    parts,
    grid_w,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (parts, C): the sum of a part's masked pixels; maps (pixels, C).

    A part takes every parts-th tile of pixels. grid_to_patch (B, grid rows, grid_w) int32. Grid: (parts * tiles of C,).
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) // blocks_c
    column = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < CHANNELS
    lane = tl.arange(0, BLOCK_R).to(tl.int64)
    sums = tl.zeros((BLOCK_R, BLOCK_C), partial.dtype.element_ty)
    for tile in range(part, (pixels + BLOCK_R - 1) // BLOCK_R, parts):
        pixel = tile * BLOCK_R + lane
        present = pixel < pixels
        masked = present & (pixel_row(pixel, present, grid_to_patch, grid_w, SIDE) < 0)
        at = maps + pixel[:, None] * CHANNELS + column[None, :]
        sums += tl.load(at, mask=masked[:, None] & inside[None, :], other=0.0).to(partial.dtype.element_ty)
    tl.store(partial + part.to(tl.int64) * CHANNELS + column, tl.sum(sums, 0), mask=inside)
