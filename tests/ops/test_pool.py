"""Pooling: every backend against the reference and the dense simulation, in every dtype and instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import tuning
from spark_fast.ops.densify import gather_patches, scatter_patches
from spark_fast.ops.pool import avg_pool2d, configs, max_pool2d, reference
from spark_fast.ops.window import Geometry, Window

# side, arguments
POOLS = {
    "2x2": (4, dict(kernel_size=2)),
    "3x3 stride 2": (8, dict(kernel_size=3, stride=2, padding=1)),
    "3x3": (1, dict(kernel_size=3, stride=1, padding=1)),
    "ceil": (2, dict(kernel_size=3, stride=2, ceil_mode=True)),
}
# The same for the interpreter, and what only these kernels do.
TRITON_POOLS = POOLS | {
    "3x3 stride 2": (4, dict(kernel_size=3, stride=2, padding=1)),
    "runs within a patch": (9, dict(kernel_size=(1, 3), stride=1, padding=(0, 1))),
    "lines of taps in chunks": (2, dict(kernel_size=(3, 11), stride=(1, 1), padding=(1, 5))),
    "chunks, stride 2": (4, dict(kernel_size=(2, 11), stride=2, padding=(0, 5))),
    "dilated, stride 2": (4, dict(kernel_size=2, stride=2, padding=1, dilation=2)),
    "row by row": (3, dict(kernel_size=5, stride=2)),
}
AVERAGES = POOLS | {
    "no pad counted": (4, dict(kernel_size=3, stride=1, padding=1, count_include_pad=False)),
    "ceil, no pad counted": (4, dict(kernel_size=2, stride=2, ceil_mode=True, count_include_pad=False)),
    "divisor": (2, dict(kernel_size=2, divisor_override=3)),
}


def rows(patches, side, channels, dtype):
    # Rounded, so that there are ties, also with the zeros of masked pixels.
    return torch.randn(patches.rows(side), channels, dtype=torch.float64).mul(2).round().div(2).to(dtype)


def simulated(op, patches, side, x, **arguments):
    return gather_patches(op(scatter_patches(x, patches, side), **arguments), patches)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 65])
@pytest.mark.parametrize("name", POOLS)
def test_max_equals_the_reference(name, channels, dtype, patches):
    side, arguments = POOLS[name]
    x = rows(patches, side, channels, dtype)
    ours = value_and_grads(lambda t: max_pool2d(t, patches, side, **arguments)[0], x)
    with use_backend("reference"):
        theirs = value_and_grads(lambda t: max_pool2d(t, patches, side, **arguments)[0], x)
    dense = value_and_grads(lambda t: simulated(F.max_pool2d, patches, side, t, **arguments), x.double())
    for other in (theirs, dense):
        assert torch.equal(ours[0].double(), other[0].double())
    # Sums of a few gradients: their order differs.
    assert_as_exact(ours[1][0], theirs[1][0], dense[1][0], "grad input", 9)


@pytest.mark.parametrize("name", POOLS)
def test_max_on_every_instruction_set(name, some_patches, instruction_set):
    side, arguments = POOLS[name]
    x = rows(some_patches, side, 33, torch.float32)
    ours = value_and_grads(lambda t: max_pool2d(t, some_patches, side, **arguments)[0], x)
    dense = value_and_grads(lambda t: simulated(F.max_pool2d, some_patches, side, t, **arguments), x)
    assert torch.equal(ours[0], dense[0])
    torch.testing.assert_close(ours[1], dense[1])


def check_triton(name, dtype, patches, channels):
    """Values and winning taps are the reference's; the gradient is as exact."""
    from spark_fast.ops.pool import triton

    side, arguments = TRITON_POOLS[name]
    x = rows(patches, side, channels, dtype).to(patches.device)
    geometry = Geometry.of(patches, side, window_of(**arguments), arguments.get("ceil_mode", False))
    for ours, theirs in zip(triton.max_forward(x, geometry), reference.max_forward(x, geometry), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    _, ours = value_and_grads(lambda t: max_pool2d(t, patches, side, **arguments)[0], x)
    with use_backend("reference"):
        _, theirs = value_and_grads(lambda t: max_pool2d(t, patches, side, **arguments)[0], x)
        _, oracle = value_and_grads(lambda t: max_pool2d(t, patches, side, **arguments)[0], x.double())
    assert ours[0].dtype == dtype
    assert_as_exact(ours[0], theirs[0], oracle[0], "grad input", 9)


def window_of(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    return Window(
        *(v if isinstance(v, tuple) else (v, v) for v in (kernel_size, stride or kernel_size, padding, dilation))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TRITON_POOLS)
def test_triton_max(name, dtype, some_patches, on_triton):
    with tuning.forced({"BLOCK_R": 64, "BLOCK_C": 8, "num_warps": 4}):  # few programs: the interpreter is slow
        check_triton(name, dtype, sf.ActivePatches(some_patches.active.to(on_triton)), 7)


@pytest.mark.parametrize("name", ["2x2", "3x3"])
def test_triton_max_on_any_mask(name, patches, on_triton):
    check_triton(name, torch.float32, sf.ActivePatches(patches.active.to(on_triton)), 7)


@pytest.mark.parametrize("number", range(len(configs.TILES)))
def test_triton_max_in_every_configuration(number, some_patches, on_triton):
    with tuning.forced(configs.TILES[number]):
        channels = configs.TILES[number]["BLOCK_C"] + 1
        check_triton("2x2", torch.bfloat16, sf.ActivePatches(some_patches.active.to(on_triton)), channels)


def test_triton_max_of_nan_infinity_and_windows_outside(some_patches, on_triton):
    from spark_fast.ops.pool import triton

    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    values = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -1.0], device=on_triton)
    for window in (Window((3, 3), (1, 1), (1, 1)), Window((1, 11), (1, 1), (0, 5)), Window((1, 1), (1, 1), (0, 1))):
        side_out = 2 if window.kernel != (1, 1) else None
        size = (patches.grid[0] * 2, patches.grid[1] * 2)
        geometry = Geometry(patches, patches, window, size, size)  # for 1x1, what would be outside is cut off
        assert side_out is None or geometry.side_out == side_out
        x = values[torch.randint(len(values), (geometry.rows_in, 6), device=on_triton)]
        x[:, 0] = -torch.inf
        ours, theirs = triton.max_forward(x, geometry), reference.max_forward(x, geometry)
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True, rtol=0, atol=0)
        assert torch.equal(ours[1], theirs[1])
        assert (ours[1] == -1).any() == (window.kernel == (1, 1))
        grad = torch.randn(ours[0].shape, device=on_triton)
        torch.testing.assert_close(
            triton.max_grad_input(grad, ours[1], geometry), reference.max_grad_input(grad, ours[1], geometry)
        )


def test_triton_max_repeats_bit_for_bit_on_any_memory(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    side, arguments = TRITON_POOLS["3x3 stride 2"]
    x = rows(patches, side, 7, torch.float32).to(on_triton)
    strided = torch.empty(x.shape[::-1], device=on_triton).t().copy_(x)
    results = [
        value_and_grads(lambda t: max_pool2d(t, patches, side, **arguments)[0], t)
        for t in (x, x, strided, torch._neg_view(-x))
    ]
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grads[0], results[0][1][0])


def test_triton_max_leaves_float64_to_the_reference(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    with pytest.raises(sf.BackendError, match="float64"):
        max_pool2d(torch.randn(patches.rows(2), 3, device=on_triton).double(), patches, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["2x2", "no pad counted"])
def test_triton_average(name, dtype, some_patches, on_triton):
    test_average_equals_the_dense_simulation(name, dtype, sf.ActivePatches(some_patches.active.to(on_triton)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AVERAGES)
def test_average_equals_the_dense_simulation(name, dtype, patches):
    side, arguments = AVERAGES[name]
    x = rows(patches, side, 7, dtype).to(patches.device)
    ours, our_grads = value_and_grads(lambda t: avg_pool2d(t, patches, side, **arguments)[0], x)
    theirs, their_grads = value_and_grads(lambda t: simulated(F.avg_pool2d, patches, side, t, **arguments), x)
    oracle, grads = value_and_grads(lambda t: simulated(F.avg_pool2d, patches, side, t, **arguments), x.double())
    assert_as_exact(ours, theirs, oracle, "forward", 9)
    assert_as_exact(our_grads[0], their_grads[0], grads[0], "grad input", 9)


def test_nan_and_infinity_win(some_patches):
    x = torch.full((some_patches.rows(2), 3), -torch.inf)
    x[5, 1] = torch.nan
    ours = max_pool2d(x, some_patches, 2, 3, 1, 1)[0]
    theirs = simulated(F.max_pool2d, some_patches, 2, x, kernel_size=3, stride=1, padding=1)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("pool", [max_pool2d, avg_pool2d])
def test_bad_arguments_are_named(pool, some_patches):
    x = torch.randn(some_patches.rows(4), 3)
    with pytest.raises(ValueError, match="padding"):
        pool(x, some_patches, 4, 3, 1, 2)
    with pytest.raises(ValueError, match="whole number of pixels"):
        pool(x, some_patches, 4, 3)
    with pytest.raises(ValueError, match="kernel"):
        pool(x, some_patches, 4, 0)
    with pytest.raises(ValueError, match="rows"):
        pool(x, some_patches, 2, 2)
