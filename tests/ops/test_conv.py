"""conv2d: every backend against the float64 reference, in every dtype and instruction set."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, assert_as_exact, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import triton_launch, tuning
from spark_fast.ops.conv import configs, conv2d, reference
from spark_fast.ops.window import Geometry, Window

# in, out, groups, kernel, stride, padding, dilation, side
SHAPES = {
    "3x3": (7, 65, 1, 3, 1, 1, 1, 4),
    "3x3 side 1": (16, 40, 1, 3, 1, 1, 1, 1),
    "3x3 winograd": (16, 40, 1, 3, 1, 1, 1, 4),
    "3x3 winograd side 2": (65, 17, 1, 3, 1, 1, 1, 2),
    "3x3 stride 2": (5, 33, 1, 3, 2, 1, 1, 2),
    "stem": (3, 12, 1, 7, 2, 3, 1, 8),
    "1x1": (7, 3, 1, 1, 1, 0, 1, 2),
    "1x1 stride 2": (9, 4, 1, 1, 2, 0, 1, 2),
    "2x2 stride 2": (4, 6, 1, 2, 2, 0, 1, 4),
    "dilated": (12, 7, 1, 3, 1, 2, 2, 3),
    "grouped": (12, 8, 4, 3, 1, 1, 1, 2),
    "grouped 1x1": (6, 9, 3, 1, 1, 0, 1, 2),
    "oblong": (3, 5, 1, (1, 5), 1, (0, 2), 1, 2),
    "multiplier": (3, 6, 3, 3, 1, 1, 1, 2),
}

# The same with few enough channels for the interpreter, and what only these kernels do.
TRITON_SHAPES = {name: shape for name, shape in SHAPES.items() if "winograd" not in name} | {
    "3x3 side 2": (20, 17, 1, 3, 1, 1, 1, 2),
    "stem": (3, 12, 1, 7, 2, 3, 1, 4),
    "5x5 dilated": (3, 20, 1, 5, 1, 4, 2, 2),
    "9x9": (2, 3, 1, 9, 1, 4, 1, 1),
    "3x3 stride 3": (4, 5, 1, 3, 3, 0, 1, 3),
    "deep": (150, 4, 1, 3, 1, 1, 1, 1),
}


def make(shape, patches, dtype):
    inc, out, groups, kernel, *_, side = shape
    generator = torch.Generator().manual_seed(3)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    sizes = ((patches.rows(side), inc), (out, inc // groups, *kernel), (out,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def run(shape, patches, x, w, b):
    _, _, groups, _, stride, padding, dilation, side = shape
    return conv2d(x, w, b, patches, side, stride, padding, dilation, groups)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name, dtype, patches):
    check(SHAPES[name], dtype, patches)


@pytest.mark.parametrize("name", SHAPES)
def test_every_instruction_set(name, some_patches, instruction_set):
    check(SHAPES[name], torch.float32, some_patches)


def check(shape, dtype, patches):
    inputs = [t.to(patches.device) for t in make(shape, patches, dtype)]
    ours, our_grads = value_and_grads(lambda *t: run(shape, patches, *t), *inputs)
    with use_backend("reference"):
        theirs, their_grads = value_and_grads(lambda *t: run(shape, patches, *t), *inputs)
        oracle, grads = value_and_grads(lambda *t: run(shape, patches, *t), *(t.double() for t in inputs))
    assert ours.dtype == dtype
    x, w, _ = inputs
    taps, out_per_group = w[0, 0].numel(), w.shape[0] // shape[2]
    assert_as_exact(ours, theirs, oracle, "forward", taps * w.shape[1])
    terms = (taps * out_per_group, x.shape[0], x.shape[0])
    for what, mine, own, true, n in zip(("input", "weight", "bias"), our_grads, their_grads, grads, terms, strict=True):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, true, f"grad {what}", n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TRITON_SHAPES)
def test_triton(name, dtype, some_patches, on_triton):
    check(TRITON_SHAPES[name], dtype, sf.ActivePatches(some_patches.active.to(on_triton)))


@pytest.mark.parametrize("name", ["3x3 side 1", "3x3 stride 2", "2x2 stride 2", "grouped"])
def test_triton_on_any_mask(name, patches, on_triton):
    check(TRITON_SHAPES[name], torch.float32, sf.ActivePatches(patches.active.to(on_triton)))


def in_tf32(tensor):
    """As a GPU's tensor cores read float32: 10 bits of the mantissa, the others cut off."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(6))
def test_triton_in_every_configuration(number, dtype, some_patches, monkeypatch, on_triton):
    """Sorted rows (side 1) and natural order (side 3), several tiles of rows, output channels and depth."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # else float32 has one configuration
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    for side in (1, 3):
        shape = (70, 36, 1, 3, 1, 1, 1, side)
        inputs = [t.to(on_triton) for t in make(shape, patches, dtype)]
        x, w, b = inputs
        grad = torch.randn(patches.rows(side), 36, device=on_triton, dtype=torch.float64).to(dtype)
        geometry = Geometry.of(patches, side, Window((3, 3), (1, 1), (1, 1)))
        gather = configs.gather_configs(dtype, "tf32")[number]
        outer = configs.outer_configs(dtype, "tf32")
        outer = outer[number % len(outer)]
        from spark_fast.ops.conv import triton

        with tuning.forced(gather):
            mine = triton.forward(x, w, b, geometry, 1), triton.grad_input(grad, w, geometry, 1)
        with tuning.forced(outer):
            mine += (triton.grad_weight(grad, x, geometry, 1, w),)
        rounded = in_tf32 if on_triton.type == "cuda" and dtype == torch.float32 else lambda t: t
        for run_with, results in ((torch.Tensor.double, true := []), (rounded, own := [])):
            x_, w_, b_, grad_ = map(run_with, (x, w, b, grad))
            results += [reference.forward(x_, w_, b_, geometry, 1), reference.grad_input(grad_, w_, geometry, 1)]
            results += [reference.grad_weight(grad_, x_, geometry, 1, w_)]
        terms = (9 * 70, 9 * 36, patches.rows(side))
        for what, a, theirs, oracle, n in zip(("forward", "input", "weight"), mine, own, true, terms, strict=True):
            assert_as_exact(a, theirs, oracle, f"{what} at side {side}", n)


def test_triton_weight_gradient_in_parts(monkeypatch, patches, on_triton):
    from spark_fast.ops.conv import triton

    monkeypatch.setattr(triton, "LEAST_PART", 5)
    check(TRITON_SHAPES["3x3"], torch.float32, sf.ActivePatches(patches.active.to(on_triton)))


def test_triton_repeats_bit_for_bit(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    inputs = [t.to(on_triton) for t in make(SHAPES["3x3 side 1"], patches, torch.float32)]
    results = [value_and_grads(lambda *t: run(SHAPES["3x3 side 1"], patches, *t), *inputs) for _ in range(2)]
    for a, b in zip(*[(out, *grads) for out, grads in results], strict=True):
        assert torch.equal(a, b)


def test_triton_leaves_float64_to_the_library(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    x, w, b = (t.to(on_triton) for t in make(SHAPES["3x3"], patches, torch.float64))
    with pytest.raises(sf.BackendError, match="float64"):
        run(SHAPES["3x3"], patches, x, w, b)


def test_triton_reads_any_memory_as_it_is_meant(some_patches, on_triton):
    """Rows with a stride, and what is only marked as negated."""
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    x, w, b = (t.to(on_triton) for t in make(TRITON_SHAPES["3x3 side 1"], patches, torch.float32))
    expected = run(TRITON_SHAPES["3x3 side 1"], patches, x, w, b)
    strided = torch.empty(x.shape[::-1], device=on_triton).t().copy_(x)
    negated = [torch._neg_view(-t) for t in (x, w, b)]
    assert torch.equal(run(TRITON_SHAPES["3x3 side 1"], patches, strided, w, b), expected)
    assert torch.equal(run(TRITON_SHAPES["3x3 side 1"], patches, *negated), expected)


def test_triton_refuses_tensors_without_memory(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    inputs = [t.to(on_triton) for t in make(TRITON_SHAPES["3x3 side 1"], patches, torch.float32)]
    with FakeTensorMode() as mode:
        x, w, b = (mode.from_tensor(t) for t in inputs)
        with pytest.raises(TypeError, match="plain tensors"):
            run(TRITON_SHAPES["3x3 side 1"], patches, x, w, b)


def test_triton_launches_that_are_only_recorded_leave_no_tables_behind(some_patches, on_triton, monkeypatch):
    from spark_fast.ops.conv import triton

    monkeypatch.setattr(triton, "_schedule", lambda *_: ("unwritten",))
    geometry = Geometry.of(some_patches, 1, Window((3, 3), (1, 1), (1, 1)))
    with triton_launch.recording():
        assert triton.schedule(geometry, False, 16) == ("unwritten",)
    assert not some_patches.derived


def test_triton_measurements_hold_for_one_kernel_size(some_patches, on_triton, monkeypatch):
    """(1, 1) and (3, 1) are otherwise alike, and for few channels run with configurations of different lists."""
    cases = []

    def best(kernel, case, *_):
        cases.append((kernel, case))

    monkeypatch.setattr(tuning, "best", best)
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    for height in (1, 3):
        x, w = torch.randn(patches.rows(3), 4, device=on_triton), torch.randn(5, 4, height, 1, device=on_triton)
        with use_backend("triton", "conv"):
            out, _ = conv2d(x.requires_grad_(), w.requires_grad_(), None, patches, 3, 3)
            out.sum().backward()
    assert len(cases) == len(set(cases)) == 6


def test_triton_schedule(some_patches, on_triton):
    """Every row once; a tile's list holds the taps of its rows; what they read is what the geometry says."""
    from spark_fast.ops.conv.triton import schedule

    patches, block = sf.ActivePatches(some_patches.active.to(on_triton)), 16
    geometry = Geometry.of(patches, 2, Window((3, 3), (1, 1), (1, 1)))
    order, counts, lists, sources = schedule(geometry, False, block)
    assert schedule(geometry, False, block)[0] is order  # kept
    assert torch.equal(order.sort().values.cpu(), torch.arange(patches.rows(2), dtype=torch.int32))
    neighbors = geometry.neighbors.cpu()
    for tile, rows in enumerate(order.cpu().split(block)):
        needed = {tap for tap in range(9) if (neighbors[tap, rows.long()] >= 0).any()}
        found = lists[tile, : counts[tile]].tolist()
        assert set(found) == needed and len(found) == len(needed)
        for place, tap in enumerate(found):
            expected = neighbors[tap, rows.long()]
            assert torch.equal(sources[tile, place, : len(rows)].cpu().long(), expected)
    assert counts.sum() < 9 * len(counts)  # some taps are skipped


@pytest.mark.parametrize("name", SHAPES)
def test_gradcheck(name, some_patches):
    shape = SHAPES[name]
    if shape[-1] > 4:
        shape = (*shape[:-1], 4)
    inputs = [t.requires_grad_() for t in make(shape, some_patches, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: run(shape, some_patches, *t), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["3x3", "3x3 side 1", "3x3 winograd", "stem"])
def test_threads_do_not_change_the_result(name, some_patches):
    shape = SHAPES[name]
    inputs = make(shape, some_patches, torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, grads = value_and_grads(lambda *t: run(shape, some_patches, *t), *inputs)
        results.append((out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_frozen_weight_and_any_mask(backend, groups, patches):
    x = torch.randn(patches.rows(2), 4, requires_grad=True)
    with use_backend(backend):
        conv2d(x, torch.ones(4, 4 // groups, 3, 3), None, patches, 2, padding=1, groups=groups)[0].sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("channels", [(0, 5), (20, 0)])
def test_no_channels(channels, some_patches):
    channels, out = channels
    x = torch.ones(some_patches.rows(2), channels, requires_grad=True)
    w = torch.ones(out, channels, 3, 3, requires_grad=True)
    y, _ = conv2d(x, w, torch.ones(out), some_patches, 2, padding=1)
    assert y.shape == (x.shape[0], out) and (y == 1).all()
    y.sum().backward()
    assert x.grad.shape == x.shape and w.grad.shape == w.shape


def test_no_bias_and_frozen_weight(some_patches):
    x, w, _ = make(SHAPES["3x3"], some_patches, torch.float32)
    x.requires_grad_()
    out = run(SHAPES["3x3"], some_patches, x, w, None)
    out.sum().backward()
    assert x.grad is not None and w.grad is None


def test_non_contiguous_rows_are_not_misread(some_patches):
    shape = SHAPES["3x3"]
    x, w, b = make(shape, some_patches, torch.float32)
    strided = torch.empty(x.shape[1], x.shape[0]).t().copy_(x)
    torch.testing.assert_close(run(shape, some_patches, strided, w, b), run(shape, some_patches, x, w, b))
    flipped = w.flip(2).flip(2)
    view = torch.empty(*w.shape[2:], *w.shape[:2]).permute(2, 3, 0, 1).copy_(flipped)
    torch.testing.assert_close(run(shape, some_patches, x, view, b), run(shape, some_patches, x, w, b))


def test_autocast_uses_its_dtype_and_gives_gradients_in_the_parameters(some_patches):
    x, w, b = (t.requires_grad_() for t in make(SHAPES["3x3"], some_patches, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = run(SHAPES["3x3"], some_patches, x, w, b)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {t.grad.dtype for t in (x, w, b)} == {torch.float32}


def test_padding_by_name(some_patches):
    x, w, b = make(SHAPES["3x3"], some_patches, torch.float64)
    same, _ = conv2d(x, w, b, some_patches, 4, padding="same")
    torch.testing.assert_close(same, conv2d(x, w, b, some_patches, 4, padding=1)[0])
    with pytest.raises(ValueError, match="padding"):
        conv2d(x, w, b, some_patches, 4, stride=2, padding="same")
    with pytest.raises(ValueError, match="whole number of pixels"):
        conv2d(x, w, b, some_patches, 4, padding="valid")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, w, b: (x[:-1], w, b), ValueError, "rows"),
        (lambda x, w, b: (x.long(), w, b), TypeError, "floating"),
        (lambda x, w, b: (x, w[:, 1:], b), ValueError, "channels"),
        (lambda x, w, b: (x, w[0], b), ValueError, "weight"),
        (lambda x, w, b: (x, w.half(), b), TypeError, "weight"),
        (lambda x, w, b: (x, w, b[:-1]), ValueError, "bias"),
        (lambda x, w, b: (x.to("meta"), w, b), ValueError, "meta"),
        (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight"),
    ],
)
def test_bad_arguments_are_named(change, error, words, some_patches):
    x, w, b = change(*make(SHAPES["3x3"], some_patches, torch.float32))
    with pytest.raises(error, match=words):
        conv2d(x, w, b, some_patches, 4, padding=1)
