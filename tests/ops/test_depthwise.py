"""Depthwise conv2d: every backend against the float64 reference, in every dtype and instruction set."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, assert_as_exact, value_and_grads

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import tuning
from spark_fast.ops.depthwise import configs, depthwise_conv2d
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

# Every class of shape, small enough for the interpreter, and what only these kernels do.
TRITON_SHAPES = {
    "7x7": (5, Window((7, 7), padding=(3, 3)), 2),
    "7x7 side 1": (7, Window((7, 7), padding=(3, 3)), 1),
    "3x3 stride 2": (9, Window((3, 3), (2, 2), (1, 1)), 2),
    "5x5 dilated": (3, Window((5, 5), padding=(4, 4), dilation=(2, 2)), 2),
    "1x1": (9, Window((1, 1)), 2),
    "3x3 lines of 6": (5, Window((3, 3), padding=(1, 1)), 6),
    "4x4 stride 2": (5, Window((4, 4), (2, 2), (1, 1)), 4),
    "2x2 stride 2": (3, Window((2, 2), (2, 2)), 4),
    "7x7 stride 2": (3, Window((7, 7), (2, 2), (3, 3)), 4),
    "3x7": (4, Window((3, 7), (1, 1), (1, 3)), 4),
    "3x3 stride 3": (4, Window((3, 3), (3, 3)), 3),
    "3x3 stride 2 dilated": (4, Window((3, 3), (2, 2), (2, 2), (2, 2)), 4),
    "runs within a patch": (2, Window((1, 3), padding=(0, 1)), 9),
    "runs within a patch, stride 2": (2, Window((1, 2), (2, 2)), 12),
    "lines of taps in chunks": (3, Window((3, 11), padding=(1, 5)), 2),
    "chunks, stride 2": (3, Window((2, 11), (2, 2), (0, 5)), 2),
    "row by row": (3, Window((5, 5), (2, 2)), 3),
    "row by row, stride 9": (2, Window((1, 9), (9, 9)), 9),
}
# Few programs, which is what takes the interpreter's time, and still several blocks of channels.
TALL = {"BLOCK_R": 64, "BLOCK_C": 8, "num_warps": 4}


def check(name, dtype, patches, shapes=SHAPES):
    channels, window, side = shapes[name]
    geometry = Geometry.of(patches, side, window)
    generator = torch.Generator().manual_seed(3)
    sizes = ((geometry.rows_in, channels), (channels, 1, *window.kernel), (channels,))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(patches.device, dtype) for s in sizes]

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TRITON_SHAPES)
def test_triton(name, dtype, some_patches, on_triton):
    with tuning.forced(TALL):
        check(name, dtype, ActivePatches(some_patches.active.to(on_triton)), TRITON_SHAPES)


@pytest.mark.parametrize("name", ["5x5 dilated", "3x3 stride 2"])
def test_triton_on_any_mask(name, patches, on_triton):
    with tuning.forced(TALL):
        check(name, torch.float32, ActivePatches(patches.active.to(on_triton)), TRITON_SHAPES)


@pytest.mark.parametrize("config", [*configs.GATHER, *configs.PRODUCT, *configs.FLOAT32_PRODUCT], ids=str)
def test_triton_in_every_configuration(config, some_patches, on_triton):
    patches = ActivePatches(some_patches.active.to(on_triton))
    shapes = {"several blocks": (config["BLOCK_C"] + 1, Window((2, 3), (2, 2), (0, 1)), 4)}
    with tuning.forced(config):
        check("several blocks", torch.bfloat16, patches, shapes)


def test_triton_weight_gradient_in_parts(monkeypatch, patches, on_triton):
    from spark_fast.ops.depthwise import triton

    monkeypatch.setattr(triton, "LEAST_PART", 3)
    monkeypatch.setattr(triton, "MOST_STEPS", 2)
    with tuning.forced({"BLOCK_R": 8, "BLOCK_C": 8, "num_warps": 4}):
        check("3x3 stride 3", torch.float32, ActivePatches(patches.active.to(on_triton)), TRITON_SHAPES)


def test_triton_repeats_bit_for_bit(some_patches, on_triton):
    patches = ActivePatches(some_patches.active.to(on_triton))
    channels, window, side = TRITON_SHAPES["lines of taps in chunks"]
    geometry = Geometry.of(patches, side, window)
    x = torch.randn(geometry.rows_in, channels, device=on_triton)
    weight = torch.randn(channels, 1, *window.kernel, device=on_triton)
    with tuning.forced(TALL):
        results = [value_and_grads(lambda *t: depthwise_conv2d(*t, None, geometry), x, weight) for _ in range(2)]
    for a, b in zip(*[(out, *grads) for out, grads in results], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["lines of taps in chunks", "chunks, stride 2", "3x3 stride 2"])
def test_triton_keeps_nan_where_it_is_read(name, some_patches, on_triton):
    """Also where taps are taken together with some beyond the kernel, whose weights are 0."""
    patches = ActivePatches(some_patches.active.to(on_triton))
    channels, window, side = TRITON_SHAPES[name]
    geometry = Geometry.of(patches, side, window)
    x, grad = (torch.randn(n, channels, device=on_triton) for n in (geometry.rows_in, geometry.rows_out))
    weight = torch.randn(channels, 1, *window.kernel, device=on_triton)
    for grid_column in range(patches.grid[1]):
        bad = patches.index[2] == grid_column
        bad_in, bad_out = bad.repeat_interleave(side**2), bad.repeat_interleave(geometry.side_out**2)
        neighbors = geometry.neighbors  # (taps, rows_out)
        with tuning.forced(TALL):
            features = x.masked_fill(bad_in[:, None], torch.nan)
            ours = depthwise_conv2d(features, weight, None, geometry).isnan()
            expected = (bad_in[neighbors] & (neighbors >= 0)).any(0)
            assert torch.equal(ours, expected[:, None].expand_as(ours))
            features = x.clone().requires_grad_()
            out = depthwise_conv2d(features, weight, None, geometry)
            (ours,) = torch.autograd.grad(out, features, grad.masked_fill(bad_out[:, None], torch.nan))
        read = neighbors[:, bad_out]
        expected = torch.zeros(geometry.rows_in, dtype=torch.bool, device=on_triton)
        expected[read[read >= 0]] = True
        assert torch.equal(ours.isnan(), expected[:, None].expand_as(ours))


def test_triton_leaves_float64_to_the_reference(some_patches, on_triton):
    geometry = Geometry.of(ActivePatches(some_patches.active.to(on_triton)), 2, Window((3, 3), padding=(1, 1)))
    x, weight = (torch.randn(s, device=on_triton).double() for s in ((geometry.rows_in, 5), (5, 1, 3, 3)))
    with pytest.raises(sf.BackendError, match="float64"):
        depthwise_conv2d(x, weight, None, geometry)


def test_triton_reads_any_memory_as_it_is_meant(some_patches, on_triton):
    """Rows and weights with strides, and what is only marked as negated."""
    geometry = Geometry.of(ActivePatches(some_patches.active.to(on_triton)), 2, Window((3, 3), padding=(1, 1)))
    x, bias = torch.randn(geometry.rows_in, 5, device=on_triton), torch.randn(5, device=on_triton)
    weight = torch.randn(5, 1, 3, 3, device=on_triton)
    expected = depthwise_conv2d(x, weight, bias, geometry)
    strided = torch.empty(x.shape[::-1], device=on_triton).t().copy_(x)
    turned = weight.mT.contiguous().mT
    assert torch.equal(depthwise_conv2d(strided, turned, bias, geometry), expected)
    negated = [torch._neg_view(-t) for t in (x, weight, bias)]
    assert torch.equal(depthwise_conv2d(*negated, geometry), expected)


def test_runs_read_the_columns_that_the_geometry_says(some_patches):
    """What the kernels are told about a run: each tap of each pixel once, in the column that it reads."""
    from spark_fast.ops.triton_window import MOST_PIXELS, MOST_TAPS, runs_of

    for name, (_, window, side) in {**SHAPES, **TRITON_SHAPES}.items():
        geometry = Geometry.of(some_patches, side, window)
        for transposed in (False, True):
            runs = runs_of(geometry, transposed, 4)
            if runs is None:
                assert transposed and "row by row" in name
                continue
            stride, padding, dilation = window.stride[1], window.padding[1], window.dilation[1]
            assert runs["PIXELS"] <= MOST_PIXELS and runs["CHUNK"] <= max(MOST_TAPS, window.stride[1])
            found = {}
            for at, tap in enumerate(runs["USES"]):
                if tap >= 0:
                    found[at % runs["PIXELS"], tap] = runs["FIRST"] + at // runs["PIXELS"]
            for pixel in range(runs["PIXELS"]):
                for tap in range(runs["CHUNK"]):
                    column = pixel * stride - padding + tap * dilation
                    if transposed:
                        scaled = pixel + padding - tap * dilation
                        column = None if scaled % stride else scaled // stride
                    assert found.pop((pixel, tap), None) == column, name
            assert not found


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
