"""Triton kernels of batch norm and layer norm on rows.

With `maps`, (patches, side, fill), the rows are normalised into dense maps (B, C, gh * side, gw * side) whose masked
pixels are `fill` (C,) or 0; a backward pass reads the gradient of such maps, of active pixels only.

Sums over rows are made in parts, one program each, and added in a fixed order; nothing is atomic. A pass that follows
takes the rows in the opposite order, since the last ones read are those still in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.norm import configs
from spark_fast.ops.triton_launch import launch, packed, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.triton_window import pixel_row, row_pixel

WRITES_MAPS = True
PROGRAMS = 1024  # that sum over rows: enough to fill any GPU; a fixed number, so that sums do not depend on the GPU
MOST_PARTS = 512
LEAST_TILES = 4  # of a part
MOST_CHANNELS = 4096  # of a row that a program holds as a whole
CHUNK = 2048  # channels at a time of a longer one


def unsupported(features) -> str | None:
    return "float64 runs on PyTorch's library" if features.dtype == torch.float64 else None


def batch_statistics(features, running_mean, running_var, momentum, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal deviation (C,) in float32; the running statistics are updated in place, without a sync."""
    (features,) = packed(features)
    rows, channels = features.shape

    def run(config):
        tile = _batch_tile(config, channels)
        parts = _parts(rows, channels, tile)
        partial = features.new_empty(parts, 2, channels, dtype=torch.float32)
        grid = (parts * triton.cdiv(channels, tile["BLOCK_C"]),)
        launch(part_statistics, grid, features, partial, rows, parts, CHANNELS=channels, **tile)
        return partial, tile["BLOCK_R"]

    partial, block = _tuned("norm.batch_statistics", (features.dtype, channels), features, configs.BATCH, run)
    mean, rstd = (features.new_empty(channels, dtype=torch.float32) for _ in "12")
    updated = packed(running_mean, running_var)
    launch(
        join_statistics, (triton.cdiv(channels, 16),), partial, mean, rstd, *updated, rows, partial.shape[0], momentum,
        eps, CHANNELS=channels, BLOCK_R=block, BLOCK_P=128, BLOCK_C=16, num_warps=4,
    )  # fmt: skip
    for given, new in zip((running_mean, running_var), updated, strict=True):
        if given is not None and given is not new:
            given.copy_(new)
        elif given is not None:
            torch.autograd.graph.increment_version(given)  # the kernel wrote to it unseen
    return mean, rstd


def batch_apply(features, residual, mean, rstd, weight, bias, activation, dtype=None, maps=None) -> torch.Tensor:
    """activation(norm(features) + residual), of the features' dtype if no other is given."""
    features, residual, mean, rstd, weight, bias = packed(features, residual, mean, rstd, weight, bias)
    channels = features.shape[1]
    filled, side = _filled(maps)

    def run(config):
        out = _result(features, maps, dtype)
        places = out.numel() // max(channels, 1)
        tile = _batch_tile(config, channels)
        launch(
            write_normal, (_tiles(places, channels, tile),), features, residual, mean, rstd, weight, bias, out, places,
            *filled, CHANNELS=channels, ACTIVATION=activation, SIDE=side, **tile,
        )  # fmt: skip
        return out

    added = None if residual is None else residual.dtype
    case = (features.dtype, channels, activation, added, dtype or features.dtype, *_sides(maps))
    return _as_maps(_tuned("norm.batch_apply", case, features, configs.BATCH, run))


def batch_norm_backward(
    grad, features, residual, mean, rstd, weight, bias, training, activation, maps=None
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of features, weight and bias, and of the residual if there is one.

    The activation's mask is computed again.
    """
    grad, features, residual, mean, rstd, weight, bias = packed(
        _as_rows(grad), features, residual, mean, rstd, weight, bias
    )
    rows, channels = features.shape
    places, side = _places(maps)

    def sums_in(config):
        tile = _batch_tile(config, channels)
        grad_residual = None if residual is None else torch.empty_like(residual)
        sums = _column_sums(
            grad, features, residual, mean, rstd, weight, bias, grad_residual, activation, False, maps, tile
        )
        return sums, grad_residual

    case = (features.dtype, grad.dtype, channels, activation, residual is not None, *_sides(maps))
    sums, grad_residual = _tuned("norm.batch_sums", case, features, configs.BATCH, sums_in)
    if residual is not None:  # its gradient is that of the activation's input
        grad, activation = grad_residual, None

    def run(config):
        out = torch.empty_like(features)
        tile = _batch_tile(config, channels)
        launch(
            batch_grad, (_tiles(rows, channels, tile),), grad, features, mean, rstd, weight, bias, sums, out, rows,
            *places, CHANNELS=channels, ACTIVATION=activation, TRAINING=training, SIDE=side, **tile,
        )  # fmt: skip
        return out

    case = (features.dtype, grad.dtype, channels, activation, *_sides(maps), training)
    return _tuned("norm.batch_grad", case, features, configs.BATCH, run), sums[1], sums[0], grad_residual


def layer_norm_forward(features, weight, bias, eps, maps=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of each row, and the mean and the reciprocal deviation (N,) in float32."""
    features, weight, bias = packed(features, weight, bias)
    rows, channels = features.shape
    mean, rstd = (features.new_empty(rows, dtype=torch.float32) for _ in "12")
    filled, side = _filled(maps)

    def run(config):
        out = _result(features, maps)
        places = out.numel() // max(channels, 1)
        tile = _layer_tile(config, channels)
        launch(
            layer_apply, (triton.cdiv(places, tile["BLOCK_R"]) if channels else 0,), features, weight, bias, out, mean,
            rstd, places, eps, *filled, CHANNELS=channels, SIDE=side, **tile,
        )  # fmt: skip
        return out

    case = (features.dtype, channels, *_sides(maps))
    return _as_maps(_tuned("norm.layer", case, features, configs.LAYER, run)), mean, rstd


def layer_norm_backward(
    grad, features, weight, bias, mean, rstd, maps=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of features, weight and bias."""
    grad, features, weight = packed(_as_rows(grad), features, weight)
    rows, channels = features.shape
    places, side = _places(maps)
    whole = channels <= MOST_CHANNELS

    def run(config):
        out = torch.empty_like(features)
        tile = _layer_tile(config, channels)
        tiles = triton.cdiv(rows, tile["BLOCK_R"]) if channels else 0
        parts = min(MOST_PARTS, triton.cdiv(tiles, LEAST_TILES)) if whole else tiles
        partial = features.new_empty(parts, 2, channels, dtype=torch.float32) if whole else None
        launch(
            layer_grad, (parts,), grad, features, weight, mean, rstd, out, partial, rows, parts, *places,
            CHANNELS=channels, SIDE=side, **tile,
        )  # fmt: skip
        return out, partial.sum(0) if whole else None

    case = (features.dtype, grad.dtype, channels, *_sides(maps))
    out, sums = _tuned("norm.layer_grad", case, features, configs.LAYER, run)
    if sums is None:

        def sums_in(config):
            tile = _batch_tile(config, channels)
            return _column_sums(grad, features, None, mean, rstd, None, None, None, None, True, maps, tile)

        sums = _tuned("norm.layer_sums", case, features, configs.BATCH, sums_in)
    return out, sums[1], sums[0]


def _tuned(kernel: str, case: tuple, features, choices, run):
    return tuning.run(kernel, case, features.shape[0], choices, choices[0], run, features.device)


def _sides(maps) -> tuple[int, ...]:
    """What of maps a measurement holds for."""
    return () if maps is None else (maps[1],)


def _result(features: torch.Tensor, maps, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory for normalised rows (N, C) or, with `maps`, for channels-last pixels (B, H, W, C)."""
    if maps is None:
        return torch.empty_like(features, dtype=dtype)
    patches, side, _ = maps
    gh, gw = patches.grid
    return features.new_empty(patches.batch, gh * side, gw * side, features.shape[1])


def _filled(maps) -> tuple[tuple, int]:
    """grid_to_patch, fill and grid_w of the kernels that normalise, and their SIDE."""
    if maps is None:
        return (None, None, None), 0
    patches, side, fill = maps
    return (patches.grid_to_patch, *packed(fill), patches.grid[1]), side


def _places(maps) -> tuple[tuple, int]:
    """coords, grid_h and grid_w of the kernels that read gradients, and their SIDE."""
    return ((None, None, None), 0) if maps is None else ((maps[0].coords, *maps[0].grid), maps[1])


def _as_maps(out: torch.Tensor) -> torch.Tensor:
    return out.permute(0, 3, 1, 2) if out.dim() == 4 else out


def _as_rows(grad: torch.Tensor) -> torch.Tensor:
    return grad.permute(0, 2, 3, 1) if grad.dim() == 4 else grad


def _batch_tile(config, channels: int) -> dict[str, int]:
    block = min(config["BLOCK_C"], triton.next_power_of_2(max(channels, 1)))
    return {"BLOCK_R": config["TILE"] // block, "BLOCK_C": block, "num_warps": config["num_warps"]}


def _layer_tile(config, channels: int) -> dict[str, int]:
    whole = triton.next_power_of_2(max(channels, 1))
    block = whole if channels <= MOST_CHANNELS else CHUNK
    warps = max(config["num_warps"], block // 512)
    return {"BLOCK_R": max(config["TILE"] // whole, 1), "BLOCK_C": block, "num_warps": warps}


def _tiles(rows: int, channels: int, tile: dict[str, int]) -> int:
    return triton.cdiv(rows, tile["BLOCK_R"]) * triton.cdiv(channels, tile["BLOCK_C"])


def _parts(rows: int, channels: int, tile: dict[str, int]) -> int:
    columns = max(triton.cdiv(channels, tile["BLOCK_C"]), 1)
    most = min(MOST_PARTS, triton.cdiv(PROGRAMS, columns))
    return min(most, triton.cdiv(triton.cdiv(rows, tile["BLOCK_R"]), LEAST_TILES))


def _column_sums(
    grad, features, residual, mean, rstd, weight, bias, before, activation, per_row: bool, maps, tile
) -> torch.Tensor:
    """(2, C) float32: sums over the rows of the gradient before the activation, and of it times the normal rows.

    `before` (rows, C), if given, is that gradient.
    """
    rows, channels = features.shape
    parts = _parts(rows, channels, tile)
    partial = features.new_empty(parts, 2, channels, dtype=torch.float32)
    places, side = _places(maps)
    launch(
        part_sums, (parts * triton.cdiv(channels, tile["BLOCK_C"]),), grad, features, residual, mean, rstd, weight,
        bias, partial, before, rows, parts, *places, CHANNELS=channels, ACTIVATION=activation, PER_ROW=per_row,
        SIDE=side, **tile,
    )  # fmt: skip
    return partial.sum(0)


@triton.jit
def _vector(pointer, column, inside, OTHER: tl.constexpr):
    """A value of each channel, (1, BLOCK_C) float32; OTHER where there is no vector."""
    if pointer is None:
        values = tl.full((1, column.shape[0]), OTHER, tl.float32)
    else:
        values = tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    """NaN passes through, as in PyTorch."""
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION is not None:
        y = tl.where(y < 0, 0.0, y)
    if ACTIVATION == "relu6":
        y = tl.where(y > 6, 6.0, y)
    return y


@triton.jit
def _before_activation(grad, y, ACTIVATION: tl.constexpr):
    """The gradient of the activation's input y: none at the kinks of a ReLU, and at NaN all of it."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(y)
        grad = grad * (s + y * s * (1 - s))
    elif ACTIVATION is not None:
        grad = tl.where(y <= 0, 0.0, grad)
    if ACTIVATION == "relu6":
        grad = tl.where(y >= 6, 0.0, grad)
    return grad


@triton.jit
def _rows_at(place, places, grid_to_patch, grid_w, SIDE: tl.constexpr):
    """The rows that belong at places of the result, and whether there are such. Place i is row i or, with
    grid_to_patch, pixel i of channels-last maps."""
    row, exists = place, place < places
    if grid_to_patch is not None:
        row = pixel_row(place, exists, grid_to_patch, grid_w, SIDE)
        exists = row >= 0
    return row, exists


@triton.jit
def _fill(to, fill, masked, column, inside):
    """Writes `fill` (C,), or 0 for None, to the masked pixels."""
    values = _vector(fill, column, inside, 0.0).to(to.dtype.element_ty)
    tl.store(to, values, mask=masked[:, None] & inside[None, :])


@triton.jit
def _places_of(row, exists, coords, grid_h, grid_w, SIDE: tl.constexpr):
    """Where the gradients of rows lie: row i at place i or, with coords, at its pixel of channels-last maps."""
    place = row
    if coords is not None:
        place = row_pixel(row, exists, coords, grid_h, grid_w, SIDE)
    return place


@triton.jit
def _rows_of(part, rows, parts, BLOCK_R: tl.constexpr):
    """How many rows a part has: it takes every parts-th tile of BLOCK_R rows, and the last tile may be shorter."""
    tiles = (rows + BLOCK_R - 1) // BLOCK_R
    whole = (tiles - part + parts - 1) // parts * BLOCK_R
    return tl.where((tiles - 1) % parts == part, whole - (tiles * BLOCK_R - rows), whole)


@triton.jit(do_not_specialize=["rows", "parts"])
def part_statistics(
    features,
    partial,
    rows,
    parts,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (parts, 2, C): mean of a part's rows, and the sum of squared distances from it.

    features (rows, C). Grid: (parts * tiles of C,). The sums are around the part's first row, so that nothing cancels.
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) // blocks_c
    column = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < CHANNELS
    lane = tl.arange(0, BLOCK_R).to(tl.int64)
    first = features + (part * BLOCK_R).to(tl.int64) * CHANNELS
    pivot = tl.load(first + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(part, (rows + BLOCK_R - 1) // BLOCK_R, parts):
        row = tile * BLOCK_R + lane
        exists = (row < rows)[:, None] & inside[None, :]
        x = tl.load(features + row[:, None] * CHANNELS + column[None, :], mask=exists, other=0.0).to(tl.float32)
        distance = tl.where(exists, x - pivot, 0.0)
        sums += distance
        squares += distance * distance
    total = tl.sum(sums, 0)[None, :]
    shift = total / _rows_of(part, rows, parts, BLOCK_R).to(tl.float32)
    squared = tl.sum(squares, 0)[None, :] - total * shift
    to = partial + part.to(tl.int64) * (2 * CHANNELS) + column[None, :]
    tl.store(to, pivot + shift, mask=inside[None, :])
    tl.store(to + CHANNELS, tl.where(squared < 0, 0.0, squared), mask=inside[None, :])


@triton.jit(do_not_specialize=["rows", "parts"])
def join_statistics(
    partial,
    mean,
    rstd,
    running_mean,
    running_var,
    rows,
    parts,
    momentum,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean, rstd (C,) of all rows from the parts' (Chan, Golub and LeVeque 1979); running statistics (C,) or None."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < CHANNELS
    lane = tl.arange(0, BLOCK_P)
    pivot = tl.load(partial + column, mask=inside, other=0.0)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + lane
        exists = (part < parts)[:, None] & inside[None, :]
        at = partial + part[:, None] * (2 * CHANNELS) + column[None, :]
        count = _rows_of(part, rows, parts, BLOCK_R).to(tl.float32)[:, None]
        sums += tl.where(exists, (tl.load(at, mask=exists, other=0.0) - pivot) * count, 0.0)
    middle = pivot + tl.sum(sums, 0)[None, :] / rows
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + lane
        exists = (part < parts)[:, None] & inside[None, :]
        at = partial + part[:, None] * (2 * CHANNELS) + column[None, :]
        count = _rows_of(part, rows, parts, BLOCK_R).to(tl.float32)[:, None]
        distance = tl.load(at, mask=exists, other=0.0) - middle
        squared = tl.load(at + CHANNELS, mask=exists, other=0.0) + distance * distance * count
        squares += tl.where(exists, squared, 0.0)
    squared = tl.sum(squares, 0)[None, :]
    inside, column = inside[None, :], column[None, :]
    tl.store(mean + column, middle, mask=inside)
    tl.store(rstd + column, 1.0 / tl.sqrt(squared / rows + eps), mask=inside)
    if running_mean is not None:
        old = tl.load(running_mean + column, mask=inside, other=0.0).to(tl.float32)
        new = old * (1 - momentum) + middle * momentum
        tl.store(running_mean + column, new.to(running_mean.dtype.element_ty), mask=inside)
    if running_var is not None:
        old = tl.load(running_var + column, mask=inside, other=0.0).to(tl.float32)
        new = old * (1 - momentum) + squared / (rows - 1) * momentum
        tl.store(running_var + column, new.to(running_var.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["places"])
def write_normal(
    features,
    residual,
    mean,
    rstd,
    weight,
    bias,
    out,
    places,
    grid_to_patch,
    fill,
    grid_w,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = activation((features - mean) * rstd * weight + bias + residual); all rows (places, C), vectors (C,).

    residual, weight and bias may be None. With grid_to_patch (B, grid rows, grid_w), `out` is the pixels of maps, and
    `fill` or 0 where masked. Grid: (tiles of places * tiles of C,).
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = program // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    column = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < CHANNELS
    row, present = _rows_at(place, places, grid_to_patch, grid_w, SIDE)
    exists = present[:, None] & inside[None, :]
    at = row[:, None] * CHANNELS + column[None, :]
    x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
    normal = (x - _vector(mean, column, inside, 0.0)) * _vector(rstd, column, inside, 1.0)
    y = normal * _vector(weight, column, inside, 1.0) + _vector(bias, column, inside, 0.0)
    if residual is not None:
        y += tl.load(residual + at, mask=exists, other=0.0).to(tl.float32)
    to = out + (place[:, None] * CHANNELS + column[None, :])
    tl.store(to, _activated(y, ACTIVATION).to(out.dtype.element_ty), mask=exists)
    if grid_to_patch is not None:
        _fill(to, fill, (place < places) & (row < 0), column, inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def part_sums(
    grad,
    features,
    residual,
    mean,
    rstd,
    weight,
    bias,
    partial,
    before,
    rows,
    parts,
    coords,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_ROW: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (parts, 2, C): a part's sums of the gradient before the activation, and of it times the normal rows.

    grad, features and residual (or None) (rows, C); mean and rstd (C,) or, PER_ROW, (rows,). `before` (rows, C) or None
    takes the gradient before the activation. With coords, grad is the pixels of maps. Grid: (parts * tiles of C,).
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) // blocks_c
    column = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < CHANNELS
    lane = tl.arange(0, BLOCK_R).to(tl.int64)
    if not PER_ROW:
        m, r = _vector(mean, column, inside, 0.0), _vector(rstd, column, inside, 1.0)
    w, b = _vector(weight, column, inside, 1.0), _vector(bias, column, inside, 0.0)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(part, (rows + BLOCK_R - 1) // BLOCK_R, parts):
        row = tile * BLOCK_R + lane
        exists = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * CHANNELS + column[None, :]
        x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
        place = _places_of(row, row < rows, coords, grid_h, grid_w, SIDE)
        g = tl.load(grad + (place[:, None] * CHANNELS + column[None, :]), mask=exists, other=0.0).to(tl.float32)
        if PER_ROW:
            m = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normal = (x - m) * r
        y = normal * w + b
        if residual is not None:
            y += tl.load(residual + at, mask=exists, other=0.0).to(tl.float32)
        g = _before_activation(g, y, ACTIVATION)
        if before is not None:
            tl.store(before + at, g.to(before.dtype.element_ty), mask=exists)
        sums += g
        products += tl.where(exists, g * normal, 0.0)
    to = partial + part.to(tl.int64) * (2 * CHANNELS) + column
    tl.store(to, tl.sum(sums, 0), mask=inside)
    tl.store(to + CHANNELS, tl.sum(products, 0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def batch_grad(
    grad,
    features,
    mean,
    rstd,
    weight,
    bias,
    sums,
    out,
    rows,
    coords,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (rows, C), the gradient of the features, from `sums` (2, C) of all rows.

    With coords, grad is the pixels of maps. Grid: (tiles of rows * tiles of C,).
    """
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = program // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    column = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < CHANNELS
    exists = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * CHANNELS + column[None, :]
    place = _places_of(row, row < rows, coords, grid_h, grid_w, SIDE)
    g = tl.load(grad + (place[:, None] * CHANNELS + column[None, :]), mask=exists, other=0.0).to(tl.float32)
    r, w = _vector(rstd, column, inside, 1.0), _vector(weight, column, inside, 1.0)
    if TRAINING or ACTIVATION is not None:
        x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
        normal = (x - _vector(mean, column, inside, 0.0)) * r
    if ACTIVATION is not None:
        y = normal * w + _vector(bias, column, inside, 0.0)
        g = _before_activation(g, y, ACTIVATION)
    if TRAINING:
        mean_g = _vector(sums, column, inside, 0.0) / rows
        mean_product = _vector(sums + CHANNELS, column, inside, 0.0) / rows
        g = g - mean_g - normal * mean_product
    tl.store(out + at, (g * (r * w)).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["places"])
def layer_apply(
    features,
    weight,
    bias,
    out,
    mean,
    rstd,
    places,
    eps,
    grid_to_patch,
    fill,
    grid_w,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = (features - mean) * rstd * weight + bias, mean and rstd (rows,) of each row; weight and bias may be None.

    With grid_to_patch (B, grid rows, grid_w), `out` is the pixels of maps, and `fill` or 0 where masked. Grid: (tiles
    of places,). The three passes are one read where BLOCK_C covers the channels.
    """
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    row, present = _rows_at(place, places, grid_to_patch, grid_w, SIDE)
    present = present[:, None]
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        at, exists, column, inside = _chunk(row, present, start, CHANNELS, BLOCK_C)
        sums += tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
    m = tl.sum(sums, 1)[:, None] / CHANNELS
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        at, exists, column, inside = _chunk(row, present, start, CHANNELS, BLOCK_C)
        distance = tl.where(exists, tl.load(features + at, mask=exists, other=0.0).to(tl.float32) - m, 0.0)
        squares += distance * distance
    r = 1.0 / tl.sqrt(tl.sum(squares, 1)[:, None] / CHANNELS + eps)
    for start in range(0, CHANNELS, BLOCK_C):
        at, exists, column, inside = _chunk(row, present, start, CHANNELS, BLOCK_C)
        x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
        y = (x - m) * r * _vector(weight, column, inside, 1.0) + _vector(bias, column, inside, 0.0)
        to = out + (place[:, None] * CHANNELS + column[None, :])
        tl.store(to, y.to(out.dtype.element_ty), mask=exists)
        if grid_to_patch is not None:
            _fill(to, fill, (place < places) & (row < 0), column, inside)
    tl.store(mean + row[:, None], m, mask=present)
    tl.store(rstd + row[:, None], r, mask=present)


@triton.jit
def _chunk(row, present, start, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_C channels of rows from `start` on: offsets, which of them exist; the channels, and which of those do."""
    column = start + tl.arange(0, BLOCK_C)
    inside = column < CHANNELS
    return row[:, None] * CHANNELS + column[None, :], present & inside[None, :], column, inside


@triton.jit(do_not_specialize=["rows", "parts"])
def layer_grad(
    grad,
    features,
    weight,
    mean,
    rstd,
    out,
    partial,
    rows,
    parts,
    coords,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (rows, C), the gradient of the features.

    partial (parts, 2, C): a part's sums of the gradient, and of it times the normal rows; None if BLOCK_C does not
    cover the channels. With coords, grad is the pixels of maps. Grid: (parts,), each of which takes every parts-th tile
    of rows.
    """
    part = tl.program_id(0)
    lane = tl.arange(0, BLOCK_R).to(tl.int64)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(part, (rows + BLOCK_R - 1) // BLOCK_R, parts):
        row = tile * BLOCK_R + lane
        m = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        present = (row < rows)[:, None]
        place = _places_of(row, row < rows, coords, grid_h, grid_w, SIDE)
        row_sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        row_products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, CHANNELS, BLOCK_C):
            at, exists, column, inside = _chunk(row, present, start, CHANNELS, BLOCK_C)
            x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
            g_at = grad + (place[:, None] * CHANNELS + column[None, :])
            g = tl.load(g_at, mask=exists, other=0.0).to(tl.float32)
            normal = tl.where(exists, (x - m) * r, 0.0)
            if partial is not None:
                sums += g
                products += g * normal
            g *= _vector(weight, column, inside, 1.0)
            row_sums += g
            row_products += g * normal
        mean_g = tl.sum(row_sums, 1)[:, None] / CHANNELS
        mean_product = tl.sum(row_products, 1)[:, None] / CHANNELS
        for start in range(0, CHANNELS, BLOCK_C):
            at, exists, column, inside = _chunk(row, present, start, CHANNELS, BLOCK_C)
            x = tl.load(features + at, mask=exists, other=0.0).to(tl.float32)
            g_at = grad + (place[:, None] * CHANNELS + column[None, :])
            g = tl.load(g_at, mask=exists, other=0.0).to(tl.float32) * _vector(weight, column, inside, 1.0)
            value = (g - mean_g - (x - m) * r * mean_product) * r
            tl.store(out + at, value.to(out.dtype.element_ty), mask=exists)
    if partial is not None:
        column = tl.arange(0, BLOCK_C)
        to = partial + part.to(tl.int64) * (2 * CHANNELS) + column
        tl.store(to, tl.sum(sums, 0), mask=column < CHANNELS)
        tl.store(to + CHANNELS, tl.sum(products, 0), mask=column < CHANNELS)
