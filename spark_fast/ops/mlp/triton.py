"""Triton kernels of the MLP's hidden rows: the GELU and its derivative, as a pass over what PyTorch's products give, or
as the end of products of our own. Measurements choose; without any, it is PyTorch's products. The other products are
PyTorch's in any case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_fast.ops import tuning
from spark_fast.ops.linear import library as linear
from spark_fast.ops.mlp import configs
from spark_fast.ops.mlp.gradients import by_products
from spark_fast.ops.triton_launch import (
    dot_constants,
    launch,
    packed,
    unavailable,  # noqa: F401  (asked by ops.backend)
)


def unsupported(features) -> str | None:
    return "float64 runs on PyTorch's library" if features.dtype == torch.float64 else None


def forward(features, weight1, bias1, weight2, bias2, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    features, weight1, bias1 = packed(features, weight1, bias1)
    (rows, channels), width = features.shape, weight1.shape[0]

    def run(config):
        if "BLOCK_K" in config:
            hidden, activated = (features.new_empty(rows, width) if wanted else None for wanted in (keep, True))
            launch(
                hidden_product, _tiles(rows, width, config), features, weight1, bias1, hidden, activated, rows,
                DEPTH=channels, WIDTH=width, **dots, **config,
            )  # fmt: skip
            return hidden, activated
        hidden = linear.forward(features, weight1, bias1)
        activated = torch.empty_like(hidden) if keep else hidden
        launch(gelu, _tiles(rows, width, config), hidden, activated, rows, WIDTH=width, **config)
        return hidden, activated

    dots = dot_constants(matmul=True)
    case = (features.dtype, channels, width, keep, bias1 is not None, dots["PRECISION"])
    hidden, activated = _tuned("mlp.hidden", case, features, configs.FORWARD, dots, run)
    return linear.forward(activated, weight2, bias2), hidden if keep else None


def backward(grad, features, hidden, weight1, weight2, wanted) -> tuple[torch.Tensor | None, ...]:
    return by_products(linear, _grad_hidden, grad, features, hidden, weight1, weight2, wanted)


def _grad_hidden(grad, weight2, hidden, activated: bool, bias: bool) -> tuple[torch.Tensor | None, ...]:
    grad, weight2, hidden = packed(grad, weight2, hidden)
    (rows, width), outputs = hidden.shape, grad.shape[1]

    def run(config):
        grid = _tiles(rows, width, config)
        out = torch.empty_like(hidden) if activated else None
        tile_rows = config["BLOCK_M"] if "BLOCK_K" in config else config["BLOCK_R"]
        sums = hidden.new_empty(triton.cdiv(rows, tile_rows), width, dtype=torch.float32) if bias else None
        if "BLOCK_K" in config:
            before = torch.empty_like(hidden)
            launch(
                grad_hidden_product, grid, grad, weight2, hidden, before, out, sums, rows, DEPTH=outputs, WIDTH=width,
                **dots, **config,
            )  # fmt: skip
        else:
            before = linear.grad_input(grad, weight2)  # in whose place the result is written
            launch(gelu_grad, grid, before, hidden, out, sums, rows, WIDTH=width, **config)
        return before, out, sums.sum(0) if bias else None

    dots = dot_constants(matmul=True)
    case = (hidden.dtype, outputs, width, activated, bias, dots["PRECISION"])
    return _tuned("mlp.grad_hidden", case, hidden, configs.BACKWARD, dots, run)


def _tuned(kernel: str, case: tuple, rows: torch.Tensor, products: list, dots: dict, run):
    choices = configs.choices(products, rows.dtype, dots["PRECISION"])
    return tuning.run(kernel, case, rows.shape[0], choices, choices[0], run, rows.device)


def _tiles(rows: int, width: int, config) -> tuple[int]:
    high, wide = ("BLOCK_M", "BLOCK_N") if "BLOCK_K" in config else ("BLOCK_R", "BLOCK_C")
    return (triton.cdiv(rows, config[high]) * triton.cdiv(width, config[wide]),)


@triton.jit
def _distribution(x):
    """The standard normal distribution function."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _tile(WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's rows and columns; tiles side by side follow one another."""
    across: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0) // across * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit(do_not_specialize=["rows"])
def gelu(hidden, activated, rows, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """activated (rows, WIDTH) = GELU of hidden (rows, WIDTH), which may be the same memory. Grid: (tiles,)."""
    row, column = _tile(WIDTH, BLOCK_R, BLOCK_C)
    exists = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    x = tl.load(hidden + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(activated + at, (x * _distribution(x)).to(activated.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def gelu_grad(grad, hidden, activated, sums, rows, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """grad (rows, WIDTH), of the GELU's output, becomes that of its input, hidden (rows, WIDTH).

    If not None: activated (rows, WIDTH) = GELU of hidden, sums (tiles of rows, WIDTH) float32 = sums of a tile's
    results over its rows. Grid: (tiles,).
    """
    row, column = _tile(WIDTH, BLOCK_R, BLOCK_C)
    exists = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    before = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
    _finish(before, grad, hidden, activated, sums, exists, at, column, WIDTH, BLOCK_R, BLOCK_C)


@triton.jit
def _finish(
    before, out, hidden, activated, sums, exists, at, column, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the gradient of the GELU's output, `before`, what `gelu_grad` tells; `before` is 0 where nothing exists."""
    x = tl.load(hidden + at, mask=exists, other=0.0).to(tl.float32)
    distribution = _distribution(x)
    found = before * (distribution + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))
    tl.store(out + at, found.to(out.dtype.element_ty), mask=exists)
    if activated is not None:
        tl.store(activated + at, (x * distribution).to(activated.dtype.element_ty), mask=exists)
    if sums is not None:
        tile = (tl.program_id(0) // ((WIDTH + BLOCK_C - 1) // BLOCK_C)).to(tl.int64)
        tl.store(sums + tile * WIDTH + column, tl.sum(found, 0), mask=column < WIDTH)


@triton.jit
def _product(
    x, weight, row, rows, column, DEPTH: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x (rows, DEPTH) times the transpose of weight (WIDTH, DEPTH), or, TRANSPOSED, times weight (DEPTH,
    WIDTH), in float32; 0 where nothing exists."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    from_x = x + row.to(tl.int64)[:, None] * DEPTH
    for step in range((DEPTH + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(from_x + k[None, :], mask=(row < rows)[:, None] & (k < DEPTH)[None, :], other=0.0)
        at = k[:, None] * WIDTH + column[None, :] if TRANSPOSED else column[None, :] * DEPTH + k[:, None]
        b = tl.load(weight + at, mask=(k < DEPTH)[:, None] & (column < WIDTH)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["rows"])
def hidden_product(
    x,
    weight,
    bias,
    hidden,
    activated,
    rows,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden (rows, WIDTH) = x (rows, DEPTH) times the transpose of weight (WIDTH, DEPTH), plus bias (WIDTH,);
    activated (rows, WIDTH) = GELU of hidden as it is rounded. bias and hidden may be None. Grid: (tiles,)."""
    row, column = _tile(WIDTH, BLOCK_M, BLOCK_N)
    sums = _product(
        x, weight, row, rows, column, DEPTH, WIDTH, False, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        sums += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    exists = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    rounded = sums.to(activated.dtype.element_ty)
    if hidden is not None:
        tl.store(hidden + at, rounded, mask=exists)
    value = rounded.to(tl.float32)
    tl.store(activated + at, (value * _distribution(value)).to(activated.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def grad_hidden_product(
    grad,
    weight,
    hidden,
    out,
    activated,
    sums,
    rows,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (rows, WIDTH) = the gradient of hidden (rows, WIDTH), where grad (rows, DEPTH) times weight (DEPTH, WIDTH) is
    that of its GELU; activated and sums as in `gelu_grad`. Grid: (tiles,)."""
    row, column = _tile(WIDTH, BLOCK_M, BLOCK_N)
    before = _product(
        grad, weight, row, rows, column, DEPTH, WIDTH, True, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    exists = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    _finish(before, out, hidden, activated, sums, exists, at, column, WIDTH, BLOCK_M, BLOCK_N)
