"""Depthwise conv2d: every backend against the float64 reference, in every dtype and instruction set."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, assert_as_exact, value_and_grads

from spark_fast import use_backend
from spark_fast.ops.depthwise import depthwise_conv2d
from spark_fast.ops.window import Geometry, Window
from spark_fast.patches import ActivePatches

# channels, window, side
SHAPES = {
    "7x7": (65, Window((7, 7), padding=(3, 3)), 4),
    "7x7 side 1": (7, Window((7, 7), padding=(3, 3)), 1),
    "3x3 stride 2": (40, Window((3, 3), (2, 2), (1, 1)), 2),
    "5x5 dilated": (3, Window((5, 5), padding=(4, 4), dilation=(2, 2)), 2),
    "1x1": (19, Window((1, 1)), 2),
    # Whole lines at once: 8, 4 and 2 pixels together, forward and (stride 2: every other pixel) backward.
    "7x7 lines of 8": (33, Window((7, 7), padding=(3, 3)), 8),
    "5x5 lines of 16": (16, Window((5, 5), padding=(2, 2)), 16),
    "3x3 lines of 6": (24, Window((3, 3), padding=(1, 1)), 6),
    "4x4 lines": (48, Window((4, 4), (2, 2), (1, 1)), 8),
    "2x2 lines": (20, Window((2, 2), (2, 2)), 8),
    "3x3 stride 2 lines": (33, Window((3, 3), (2, 2), (1, 1)), 16),
    "5x5 stride 2 lines": (40, Window((5, 5), (2, 2), (2, 2)), 4),
    "7x7 stride 2 lines": (17, Window((7, 7), (2, 2), (3, 3)), 8),
    "3x7 lines": (16, Window((3, 7), (1, 1), (1, 3)), 4),
}


def check(name, dtype, patches):
    channels, window, side = SHAPES[name]
    geometry = Geometry.of(patches, side, window)
    generator = torch.Generator().manual_seed(3)
    sizes = ((geometry.rows_in, channels), (channels, 1, *window.kernel), (channels,))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]

    def run(*tensors):
        return depthwise_conv2d(*tensors, geometry)

    ours, our_grads = value_and_grads(run, *inputs)
    with use_backend("reference"):
        theirs, their_grads = value_and_grads(run, *inputs)
        oracle, grads = value_and_grads(run, *(t.double() for t in inputs))
    assert ours.dtype == dtype
    terms = (window.taps, geometry.rows_out, geometry.rows_out)
    assert_as_exact(ours, theirs, oracle, "forward", window.taps)
    for what, mine, own, true, n in zip(("input", "weight", "bias"), our_grads, their_grads, grads, terms, strict=True):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, true, f"grad {what}", n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name, dtype, patches):
    check(name, dtype, patches)


@pytest.mark.parametrize("name", SHAPES)
def test_every_instruction_set(name, some_patches, instruction_set):
    check(name, torch.float32, some_patches)


def test_non_contiguous_weights_are_not_misread(some_patches):
    geometry = Geometry.of(some_patches, 4, Window((3, 3), padding=(1, 1)))
    x, weight = torch.randn(geometry.rows_in, 5), torch.randn(5, 1, 3, 3)
    ours = depthwise_conv2d(x, weight.mT, None, geometry)
    assert torch.equal(ours, depthwise_conv2d(x, weight.mT.contiguous(), None, geometry))


@pytest.mark.parametrize("name", SHAPES)
def test_the_threads_do_not_matter(name):
    channels, window, side = SHAPES[name]
    active = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(7)) < 0.5
    geometry = Geometry.of(ActivePatches(active), side, window)
    x, weight = torch.randn(geometry.rows_in, channels), torch.randn(channels, 1, *window.kernel)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = value_and_grads(lambda *t: depthwise_conv2d(*t, None, geometry), x, weight)
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_that_share_a_vector_of_channels_do_not_add_twice(some_patches):
    """24 channels are a vector and a half: the last one overlaps the one before. Many times, since a race is rare."""
    geometry = Geometry.of(some_patches, 4, Window((9, 7), padding=(4, 3)))
    x, weight = torch.randn(geometry.rows_in, 24), torch.randn(24, 1, 9, 7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _, alone = value_and_grads(lambda *t: depthwise_conv2d(*t, None, geometry), x, weight)
        torch.set_num_threads(2)
        for _ in range(300):
            _, grads = value_and_grads(lambda *t: depthwise_conv2d(*t, None, geometry), x, weight)
            assert torch.equal(grads[1], alone[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["3x3 stride 2", "5x5 dilated"])
def test_gradcheck(name, some_patches):
    _, window, side = SHAPES[name]
    geometry = Geometry.of(some_patches, side, window)
    sizes = ((geometry.rows_in, 3), (3, 1, *window.kernel), (3,))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv2d(*t, geometry), inputs, fast_mode=True)
