"""Triton kernels of group norm on rows.

A program takes some channels of every parts-th tile of an image's rows. The sums of a part's channels go to memory, and
a second kernel adds those of a group, in a fixed order; nothing is atomic. A pass that follows takes the rows in the
opposite order, since the last ones read are those still in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.group_norm import configs
from spark_fast.ops.group_norm.images import patch_starts
from spark_fast.ops.triton_launch import launch, packed, unavailable  # noqa: F401  (unavailable: asked by ops.backend)

PROGRAMS = 1024  # that sum over rows: enough to fill any GPU; a fixed number, so that sums do not depend on the GPU
LEAST_TILES = 4  # of a part that sums
VALUES = 1024  # of a tile of such sums


def unsupported(features) -> str | None:
    return "float64 runs on PyTorch's library" if features.dtype == torch.float64 else None


def forward(features, weight, bias, groups, eps, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of the rows, and the mean and the reciprocal deviation (B, groups) in float32; 0 and 1 without
    pixels."""
    features, weight, bias = packed(features, weight, bias)
    images = _Images(features, groups, patches, side)
    mean, rstd = images.values(), images.values()

    def statistics(config):
        tile = images.tile(config)
        partial, parts = images.partial(tile)
        launch(part_statistics, images.grid(parts, tile), features, partial, parts, *images.where, **tile)
        return partial, parts, tile["BLOCK_R"]

    partial, parts, block = images.tuned("group_norm.statistics", (), statistics)
    grid, tile = images.groups_of(parts)
    launch(group_statistics, grid, partial, mean, rstd, parts, eps, *images.where, BLOCK_R=block, **tile)

    def run(config):
        out, tile = torch.empty_like(features), images.tile(config)
        parts = images.tiles(tile)
        launch(
            image_apply, images.grid(parts, tile), features, mean, rstd, weight, bias, out, parts, *images.where,
            GROUPS=groups, **tile,
        )  # fmt: skip
        return out

    return images.tuned("group_norm.apply", (), run), mean, rstd


def backward(grad, features, weight, mean, rstd, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of features, weight and bias."""
    grad, features, weight = packed(grad, features, weight)
    groups = mean.shape[1]
    images = _Images(features, groups, patches, side)
    level, along = images.values(), images.values()

    def sums_in(config):
        tile = images.tile(config)
        partial, parts = images.partial(tile)
        launch(
            part_sums, images.grid(parts, tile), grad, features, mean, rstd, partial, parts, *images.where,
            GROUPS=groups, **tile,
        )  # fmt: skip
        return partial, parts

    partial, parts = images.tuned("group_norm.sums", (grad.dtype,), sums_in)
    grid, tile = images.groups_of(parts)
    launch(group_sums, grid, partial, weight, level, along, parts, *images.where, **tile)

    def run(config):
        out, tile = torch.empty_like(features), images.tile(config)
        parts = images.tiles(tile)
        launch(
            image_grad, images.grid(parts, tile), grad, features, mean, rstd, weight, level, along, out, parts,
            *images.where, GROUPS=groups, **tile,
        )  # fmt: skip
        return out

    out = images.tuned("group_norm.grad", (grad.dtype,), run)
    return out, partial[:, 1].sum(0), partial[:, 0].sum(0)


class _Images:
    """How programs share the images of packed rows (N, C).

    Attributes:
        where: what the kernels know about the rows of images: starts and per_image.
        average: rows of an image, rounded up.
    """

    def __init__(self, features: torch.Tensor, groups: int, patches, side: int):
        self.features, self.groups, self.batch, self.area = features, groups, patches.batch, side * side
        equal = patches.per_image
        self.where = (patch_starts(patches), 0) if equal is None else (None, equal)
        self.average = triton.cdiv(features.shape[0], max(self.batch, 1))

    def values(self) -> torch.Tensor:
        """Memory for a number of each image and group."""
        return self.features.new_empty(self.batch, self.groups, dtype=torch.float32)

    def partial(self, tile: dict[str, int]) -> tuple[torch.Tensor, int]:
        """Memory for two numbers of each image, part and channel; and the parts of an image."""
        columns = max(self.batch * triton.cdiv(self.features.shape[1], tile["BLOCK_C"]), 1)
        parts = min(triton.cdiv(self.tiles(tile), LEAST_TILES), triton.cdiv(PROGRAMS, columns))
        shape = self.batch * parts, 2, self.features.shape[1]
        return self.features.new_empty(shape, dtype=torch.float32), parts

    def tile(self, config) -> dict[str, int]:
        """Rows of an image and channels."""
        channels = triton.next_power_of_2(max(self.features.shape[1], 1))
        rows = min(config["TILE"] // min(config["BLOCK_C"], channels), triton.next_power_of_2(max(self.average, 1)))
        block = {"BLOCK_R": rows, "BLOCK_C": min(config["TILE"] // rows, channels), "num_warps": config["num_warps"]}
        return {"CHANNELS": self.features.shape[1], "AREA": self.area, **block}

    def tiles(self, tile: dict[str, int]) -> int:
        """Of the average image; at least one, which an image without rows has too."""
        return max(triton.cdiv(self.average, tile["BLOCK_R"]), 1)

    def grid(self, parts: int, tile: dict[str, int]) -> tuple[int]:
        return (self.batch * parts * triton.cdiv(tile["CHANNELS"], tile["BLOCK_C"]),)

    def groups_of(self, parts: int) -> tuple[tuple[int], dict[str, int]]:
        """Grid and constants of the kernels that add the sums of a group."""
        channels = self.features.shape[1]
        across = min(triton.next_power_of_2(max(parts * channels // self.groups, 1)), VALUES)
        block = min(VALUES // across, triton.next_power_of_2(self.groups))
        tile = {"CHANNELS": channels, "GROUPS": self.groups, "AREA": self.area, "BLOCK_G": block, "BLOCK_K": across}
        return (self.batch * triton.cdiv(self.groups, block) if channels else 0,), {**tile, "num_warps": 4}

    def tuned(self, kernel: str, case: tuple, run):
        case = (self.features.dtype, *case, self.features.shape[1], self.groups, (self.average - 1).bit_length())
        rows = self.features.shape[0]
        return tuning.run(kernel, case, rows, configs.TILES, configs.TILES[0], run, self.features.device)


@triton.jit
def _first_row(image, starts, per_image, AREA: tl.constexpr):
    """Of an image, by the patches before each image or, where starts is None, by those of every image."""
    if starts is None:
        patches = image.to(tl.int64) * per_image
    else:
        patches = tl.load(starts + image)
    return patches * AREA


@triton.jit
def _row_count(image, starts, per_image, AREA: tl.constexpr):
    if starts is None:
        patches = per_image
    else:
        patches = (tl.load(starts + image + 1) - tl.load(starts + image)).to(tl.int32)
    return patches * AREA


@triton.jit
def _program(program, parts, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, part and channels of a program, and which of the channels exist."""
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    column = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // blocks_c // parts, program // blocks_c % parts, column, column < CHANNELS


@triton.jit
def _rows_in(part, rows, parts, BLOCK_R: tl.constexpr):
    """How many rows a part has: it takes every parts-th tile of BLOCK_R rows, and the last tile may be shorter."""
    tiles = (rows + BLOCK_R - 1) // BLOCK_R
    whole = (tiles - part + parts - 1) // parts * BLOCK_R
    return tl.where((tiles + parts - 1) % parts == part, whole - (tiles * BLOCK_R - rows), whole)


@triton.jit
def _channel_values(pointer, column, inside, OTHER: tl.constexpr):
    """A value of each channel, (1, BLOCK_C) float32; OTHER where there is no vector."""
    if pointer is None:
        values = tl.full((1, column.shape[0]), OTHER, tl.float32)
    else:
        values = tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit(do_not_specialize=["parts", "per_image"])
def part_statistics(
    features,
    partial,
    parts,
    starts,
    per_image,
    CHANNELS: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (B * parts, 2, C): mean of a part's rows, and the sum of squared distances from it; 0 without rows.

    features (rows, C). Grid: (B * parts * tiles of C,). The sums are around the part's first row, so that nothing
    cancels.
    """
    image, part, column, inside = _program(tl.program_id(0), parts, CHANNELS, BLOCK_C)
    first = _first_row(image, starts, per_image, AREA)
    rows = _row_count(image, starts, per_image, AREA)
    lane = tl.arange(0, BLOCK_R)
    start = first + part * BLOCK_R
    pivot = tl.load(features + start * CHANNELS + column, mask=inside & (part * BLOCK_R < rows), other=0.0)
    pivot = pivot.to(tl.float32)[None, :]
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(part, (rows + BLOCK_R - 1) // BLOCK_R, parts):
        row = tile * BLOCK_R + lane
        exists = (row < rows)[:, None] & inside[None, :]
        at = (first + row)[:, None] * CHANNELS + column[None, :]
        distance = tl.where(exists, tl.load(features + at, mask=exists, other=0.0).to(tl.float32) - pivot, 0.0)
        sums += distance
        squares += distance * distance
    total = tl.sum(sums, 0)[None, :]
    shift = total / tl.maximum(_rows_in(part, rows, parts, BLOCK_R), 1).to(tl.float32)
    squared = tl.sum(squares, 0)[None, :] - total * shift
    to = partial + (image * parts + part).to(tl.int64) * (2 * CHANNELS) + column[None, :]
    tl.store(to, pivot + shift, mask=inside[None, :])
    tl.store(to + CHANNELS, tl.where(squared < 0, 0.0, squared), mask=inside[None, :])


@triton.jit
def _group_program(CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """The image of a program that adds sums of groups, and the groups (BLOCK_G,)."""
    blocks_g: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    return tl.program_id(0) // blocks_g, tl.program_id(0) % blocks_g * BLOCK_G + tl.arange(0, BLOCK_G)


@triton.jit
def _in_group(image, group, start, parts, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K pairs of a part and a channel of each group, from number `start` on: the parts, the channels, where they
    lie in partial, and which of them exist."""
    size: tl.constexpr = CHANNELS // GROUPS
    number = start + tl.arange(0, BLOCK_K)
    part = number // size
    channel = group[:, None] * size + (number % size)[None, :]
    at = (image * parts + part).to(tl.int64)[None, :] * (2 * CHANNELS) + channel
    return part, channel, at, (group < GROUPS)[:, None] & (part < parts)[None, :]


@triton.jit(do_not_specialize=["parts", "per_image"])
def group_statistics(
    partial,
    mean,
    rstd,
    parts,
    eps,
    starts,
    per_image,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """mean, rstd (B, GROUPS) from those of the parts' channels (Chan, Golub and LeVeque 1979); 0 and 1 without
    rows.

    Grid: (B * tiles of GROUPS,).
    """
    size: tl.constexpr = CHANNELS // GROUPS
    image, group = _group_program(CHANNELS, GROUPS, BLOCK_G)
    rows = _row_count(image, starts, per_image, AREA)
    values = tl.maximum(rows, 1).to(tl.float32) * size
    pivot = tl.load(
        partial + (image * parts).to(tl.int64) * (2 * CHANNELS) + group * size, mask=group < GROUPS, other=0.0
    )[:, None]
    sums = tl.zeros((BLOCK_G, BLOCK_K), tl.float32)
    for start in range(0, parts * size, BLOCK_K):
        part, _, at, exists = _in_group(image, group, start, parts, CHANNELS, GROUPS, BLOCK_K)
        count = _rows_in(part, rows, parts, BLOCK_R).to(tl.float32)[None, :]
        sums += tl.where(exists, (tl.load(partial + at, mask=exists, other=0.0) - pivot) * count, 0.0)
    middle = pivot + tl.sum(sums, 1)[:, None] / values
    squares = tl.zeros((BLOCK_G, BLOCK_K), tl.float32)
    for start in range(0, parts * size, BLOCK_K):
        part, _, at, exists = _in_group(image, group, start, parts, CHANNELS, GROUPS, BLOCK_K)
        count = _rows_in(part, rows, parts, BLOCK_R).to(tl.float32)[None, :]
        distance = tl.load(partial + at, mask=exists, other=0.0) - middle
        squared = tl.load(partial + at + CHANNELS, mask=exists, other=0.0) + distance * distance * count
        squares += tl.where(exists, squared, 0.0)
    to, inside = image * GROUPS + group[:, None], (group < GROUPS)[:, None]
    spread = tl.where(inside & (rows > 0), tl.sum(squares, 1)[:, None] / values + eps, 1.0)
    tl.store(mean + to, middle, mask=inside)
    tl.store(rstd + to, 1.0 / tl.sqrt(spread), mask=inside)


@triton.jit(do_not_specialize=["parts", "per_image"])
def image_apply(
    features,
    mean,
    rstd,
    weight,
    bias,
    out,
    parts,
    starts,
    per_image,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = (features - mean) * rstd * weight + bias; rows (rows, C), mean and rstd (B, GROUPS), weight and bias (C,)
    or None.

    Grid: (B * parts * tiles of C,).
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, part, column, inside = _program(program, parts, CHANNELS, BLOCK_C)
    first = _first_row(image, starts, per_image, AREA)
    rows = _row_count(image, starts, per_image, AREA)
    group = image * GROUPS + column // (CHANNELS // GROUPS)
    m = _channel_values(mean, group, inside, 0.0)
    scale = _channel_values(rstd, group, inside, 0.0) * _channel_values(weight, column, inside, 1.0)
    b = _channel_values(bias, column, inside, 0.0)
    lane = tl.arange(0, BLOCK_R)
    for tile in range(part, (rows + BLOCK_R - 1) // BLOCK_R, parts):
        row = tile * BLOCK_R + lane
        exists = (row < rows)[:, None] & inside[None, :]
        at = (first + row)[:, None] * CHANNELS + column[None, :]
        x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(out + at, ((x - m) * scale + b).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["parts", "per_image"])
def part_sums(
    grad,
    features,
    mean,
    rstd,
    partial,
    parts,
    starts,
    per_image,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (B * parts, 2, C): a part's sums of the gradient, and of it times the normal rows.

    grad and features (rows, C), mean and rstd (B, GROUPS). Grid: (B * parts * tiles of C,).
    """
    image, part, column, inside = _program(tl.program_id(0), parts, CHANNELS, BLOCK_C)
    first = _first_row(image, starts, per_image, AREA)
    rows = _row_count(image, starts, per_image, AREA)
    group = image * GROUPS + column // (CHANNELS // GROUPS)
    m, r = _channel_values(mean, group, inside, 0.0), _channel_values(rstd, group, inside, 0.0)
    lane = tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(part, (rows + BLOCK_R - 1) // BLOCK_R, parts):
        row = tile * BLOCK_R + lane
        exists = (row < rows)[:, None] & inside[None, :]
        at = (first + row)[:, None] * CHANNELS + column[None, :]
        x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
        sums += g
        products += tl.where(exists, g * ((x - m) * r), 0.0)
    to = partial + (image * parts + part).to(tl.int64) * (2 * CHANNELS) + column
    tl.store(to, tl.sum(sums, 0), mask=inside)
    tl.store(to + CHANNELS, tl.sum(products, 0), mask=inside)


@triton.jit(do_not_specialize=["parts", "per_image"])
def group_sums(
    partial,
    weight,
    level,
    along,
    parts,
    starts,
    per_image,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """level and along (B, GROUPS): means of weight times the gradient, and of that times the normal rows, from the
    parts' sums; 0 without rows. weight (C,) or None.

    Grid: (B * tiles of GROUPS,).
    """
    size: tl.constexpr = CHANNELS // GROUPS
    image, group = _group_program(CHANNELS, GROUPS, BLOCK_G)
    rows = _row_count(image, starts, per_image, AREA)
    values = tl.maximum(rows, 1).to(tl.float32) * size
    sums = tl.zeros((BLOCK_G, BLOCK_K), tl.float32)
    products = tl.zeros((BLOCK_G, BLOCK_K), tl.float32)
    for start in range(0, parts * size, BLOCK_K):
        _, channel, at, exists = _in_group(image, group, start, parts, CHANNELS, GROUPS, BLOCK_K)
        s = tl.load(partial + at, mask=exists, other=0.0)
        p = tl.load(partial + at + CHANNELS, mask=exists, other=0.0)
        if weight is not None:
            w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
            s, p = s * w, p * w
        sums += s
        products += p
    to, inside = image * GROUPS + group, group < GROUPS
    tl.store(level + to, tl.sum(sums, 1) / values, mask=inside)
    tl.store(along + to, tl.sum(products, 1) / values, mask=inside)


@triton.jit(do_not_specialize=["parts", "per_image"])
def image_grad(
    grad,
    features,
    mean,
    rstd,
    weight,
    level,
    along,
    out,
    parts,
    starts,
    per_image,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (rows, C), the gradient of the features, from level and along (B, GROUPS).

    Grid: (B * parts * tiles of C,).
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, part, column, inside = _program(program, parts, CHANNELS, BLOCK_C)
    first = _first_row(image, starts, per_image, AREA)
    rows = _row_count(image, starts, per_image, AREA)
    group = image * GROUPS + column // (CHANNELS // GROUPS)
    m, r = _channel_values(mean, group, inside, 0.0), _channel_values(rstd, group, inside, 0.0)
    level_g, along_g = _channel_values(level, group, inside, 0.0), _channel_values(along, group, inside, 0.0)
    w = _channel_values(weight, column, inside, 1.0)
    lane = tl.arange(0, BLOCK_R)
    for tile in range(part, (rows + BLOCK_R - 1) // BLOCK_R, parts):
        row = tile * BLOCK_R + lane
        exists = (row < rows)[:, None] & inside[None, :]
        at = (first + row)[:, None] * CHANNELS + column[None, :]
        x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
        value = (g * w - level_g - (x - m) * r * along_g) * r
        tl.store(out + at, value.to(out.dtype.element_ty), mask=exists)
