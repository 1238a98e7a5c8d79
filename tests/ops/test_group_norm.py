"""Group norm with the statistics of each image: every backend against PyTorch's own on an image of its active pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import tuning
from spark_fast.ops.group_norm import group_norm
from spark_fast.ops.group_norm.images import patch_starts

BACKENDS = ["cpu", "library", "reference"]
# channels, groups: one channel in a group, one group, channels that fill no vectors, rows that are joined
GROUPS = [(6, 3), (1, 1), (5, 5), (7, 1), (65, 13), (64, 32), (130, 10)]
SIDES = [1, 3]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param, "group_norm"):
        yield request.param


def rows_of(patches: sf.ActivePatches, side: int) -> list[int]:
    """Active pixels of each image."""
    return (patches.active.flatten(1).sum(1) * side**2).tolist()


def pytorchs(x, patches, side, groups, w=None, b=None):
    """Of images that consist of the active pixels only, one by one. F.group_norm is this, and refuses a single value."""
    images = [torch.group_norm(i.t()[None], groups, w, b)[0].t() for i in x.split(rows_of(patches, side)) if len(i)]
    tied = sum(0 * t.sum() for t in (x, w, b) if t is not None)  # without images too
    return torch.cat(images) + tied if images else x * 1 + tied


def samples(patches, side, channels, affine, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(100 + channels)  # not that of the gradient

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [draw(channels), draw(channels)] if affine else []
    x = draw(patches.rows(side), channels) * (1 + draw(channels).abs()) + 3 * draw(channels)
    return [t.to(device, dtype) for t in (x, *weights)]


def moved(patches, device):
    return patches if device == "cpu" else sf.ActivePatches(patches.active.to(device))


def check(patches, side, channels, groups, dtype, affine=True, device="cpu"):
    inputs, there = samples(patches, side, channels, affine, dtype, device), moved(patches, device)
    ours, our_grads = value_and_grads(lambda x, *wb: group_norm(x, there, side, groups, *wb), *inputs)

    def theirs_of(x, *wb):
        return pytorchs(x, patches, side, groups, *wb)

    theirs, their_grads = value_and_grads(theirs_of, *inputs)
    oracle, grads = value_and_grads(theirs_of, *(t.double() for t in inputs))
    assert ours.dtype == dtype
    # A sum for the mean, two for the variance; six steps of the formula.
    terms = 3 * max([1, *rows_of(patches, side)]) * (channels // groups) + 6
    assert_as_exact(ours, theirs, oracle, "forward", terms)
    for name, mine, own, exact in zip(("input", "weight", "bias"), our_grads, their_grads, grads, strict=False):
        assert mine.dtype == dtype
        # Products of two normal draws reach 4.
        size = 4 * (largest_slope(inputs[0], patches, side, groups, *inputs[1:2]) if name == "input" else 1)
        assert_as_exact(mine, own, exact, f"grad {name}", max(terms, len(inputs[0])), size)


def largest_slope(x, patches, side, groups, weight=None) -> float:
    """How large the terms of the input's gradient are, which cancel the more the fewer values a group has."""
    images = [i.reshape(len(i), groups, -1) for i in x.double().split(rows_of(patches, side)) if len(i)]
    slopes = [(i.var((0, 2), correction=0) + 1e-5).rsqrt().max().item() for i in images]
    return max(slopes, default=0) * (1 if weight is None else weight.abs().max().item())


# One pixel alone, of as many groups as channels, is a case of its own below.
CASES = [(mask, side) for mask in ("equal", "unequal", "all", "one", "none") for side in (1, 3) if (mask, side) != ("one", 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "groups"), GROUPS)
@pytest.mark.parametrize(("patches", "side"), CASES, indirect=["patches"])
@pytest.mark.parametrize("affine", [True, False])
def test_equals_pytorchs_on_the_active_pixels(affine, patches, side, channels, groups, dtype, backend):
    check(patches, side, channels, groups, dtype, affine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_value_is_its_own_mean(dtype, backend):
    check_one_value(dtype)


def check_one_value(dtype, device="cpu"):
    """PyTorch refuses a single value."""
    patches = sf.ActivePatches((torch.arange(9) == 4).view(1, 3, 3).to(device))
    x, w, b = (t.to(device, dtype) for t in (torch.randn(1, 5) + 100, torch.randn(5), torch.randn(5)))
    out, grads = value_and_grads(lambda *t: group_norm(t[0], patches, 1, 5, *t[1:]), x, w, b)
    assert torch.equal(out[0], b)
    # Nothing but the rounding of the products, times the reciprocal deviation.
    torch.testing.assert_close(grads[0], torch.zeros_like(x), rtol=0, atol=1e-5**-0.5 * 2**-22)
    assert torch.equal(grads[1], torch.zeros_like(w)) and grads[2].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_half_precision(patches, dtype, backend):
    check(patches, 3, 65, 13, dtype)


@pytest.mark.parametrize(("channels", "groups"), [*GROUPS, (256, 32)])
@pytest.mark.parametrize("patches", ["equal", "unequal"], indirect=True)
def test_every_instruction_set(patches, channels, groups, instruction_set):
    check(patches, 3, channels, groups, torch.float32)


HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("channels", "groups"), GROUPS)
@pytest.mark.parametrize(("patches", "side"), CASES, indirect=["patches"])
def test_triton(patches, side, channels, groups, dtype, on_triton):
    check(patches, side, channels, groups, dtype, device=on_triton)
