"""Pooling: every backend against the reference and the dense simulation, in every dtype and instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads

from spark_fast import use_backend
from spark_fast.ops.densify import gather_patches, scatter_patches
from spark_fast.ops.pool import avg_pool2d, max_pool2d

# side, arguments
POOLS = {
    "2x2": (4, dict(kernel_size=2)),
    "3x3 stride 2": (8, dict(kernel_size=3, stride=2, padding=1)),
    "3x3": (1, dict(kernel_size=3, stride=1, padding=1)),
    "ceil": (2, dict(kernel_size=3, stride=2, ceil_mode=True)),
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AVERAGES)
def test_average_equals_the_dense_simulation(name, dtype, patches):
    side, arguments = AVERAGES[name]
    x = rows(patches, side, 7, dtype)
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
