"""Norms that give dense maps: the norm, then the scatter, to the bit; every backend against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads

import spark_fast as sf
from spark_fast.ops import tuning
from spark_fast.ops.densify import reference as copies
from spark_fast.ops.densify import scatter_patches
from spark_fast.ops.norm import batch_norm, batch_norm_scatter, layer_norm, layer_norm_scatter

NORMS = ["batch", "evaluating", "layer"]
CASES = [(1, 7), (2, 65), (3, 16)]  # side, channels
HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["cpu", "library", "reference"])
def backend(request):
    with sf.use_backend(request.param, "norm"):
        yield request.param


def needs_rows(norm, patches):
    if norm == "batch" and patches.count == 0:
        pytest.skip("training needs two active pixels")


def statistics(like):
    generator = torch.Generator().manual_seed(3)
    mean, var = torch.randn(like.shape[1], generator=generator), torch.rand(like.shape[1], generator=generator) + 0.5
    return mean.to(like), var.to(like)


def one_pass(norm, patches, side, running=None):
    """Of features, fill, weight and bias."""

    def function(x, fill, w, b):
        if norm == "layer":
            return layer_norm_scatter(x, patches, side, fill, w, b)
        return batch_norm_scatter(x, patches, side, fill, *(running or statistics(x)), w, b, norm == "batch", 0.3)

    return function


def two_passes(norm, patches, side, running=None):
    def function(x, fill, w, b):
        if norm == "layer":
            rows = layer_norm(x, w, b)
        else:
            rows = batch_norm(x, *(running or statistics(x)), w, b, norm == "batch", 0.3)
        return scatter_patches(rows, patches, side, fill)

    return function


def pytorchs(norm, patches, side):
    """By PyTorch's own norms, in any dtype."""
    masked = ~patches.active[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3)

    def function(x, fill, w, b):
        if norm == "layer":
            rows = F.layer_norm(x, x.shape[1:], w, b)
        else:
            rows = F.batch_norm(x, *statistics(x), w, b, norm == "batch", 0.3)
        return torch.where(masked, fill.view(-1, 1, 1), copies.scatter(rows, patches, side, None))

    return function


def samples(patches, side, channels, dtype, device="cpu"):
    shapes = ((patches.rows(side), channels), (channels,), (channels,), (channels,))
    return [(torch.randn(shape) * 3 + 1).to(device, dtype) for shape in shapes]


def check(norm, patches, side, channels, dtype, device="cpu"):
    patches = sf.ActivePatches(patches.active.to(device))
    inputs = samples(patches, side, channels, dtype, device)
    ours, our_grads = value_and_grads(one_pass(norm, patches, side), *inputs)
    theirs, their_grads = value_and_grads(pytorchs(norm, patches, side), *inputs)
    oracle, grads = value_and_grads(pytorchs(norm, patches, side), *(t.double() for t in inputs))
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    terms = 3 * max(inputs[0].shape) + 6
    assert_as_exact(ours, theirs, oracle, "forward", terms)
    pixels = ours.numel() // channels
    names = {"input": terms, "fill": pixels, "weight": terms, "bias": terms}
    for (name, steps), mine, own, exact in zip(names.items(), our_grads, their_grads, grads, strict=True):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, exact, f"grad {name}", steps)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), CASES)
def test_equals_pytorchs(side, channels, dtype, norm, some_patches, backend):
    check(norm, some_patches, side, channels, dtype)


@pytest.mark.parametrize("norm", NORMS)
def test_is_the_norm_then_the_scatter(norm, patches, backend):
    """On any mask, running statistics included."""
    needs_rows(norm, patches)
    inputs = samples(patches, 2, 5, torch.float32)
    running = [statistics(inputs[0]) for _ in "12"]
    ours, our_grads = value_and_grads(one_pass(norm, patches, 2, running[0]), *inputs)
    theirs, their_grads = value_and_grads(two_passes(norm, patches, 2, running[1]), *inputs)
    assert all(torch.equal(a, b) for a, b in zip((ours, *our_grads), (theirs, *their_grads), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*running, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm, some_patches, backend):
    inputs = [t.requires_grad_() for t in samples(some_patches, 1, 3, torch.float64)]
    assert torch.autograd.gradcheck(one_pass(norm, some_patches, 1), inputs)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("wanted", range(4))
def test_only_the_wanted_gradient(wanted, norm, some_patches):
    inputs = samples(some_patches, 2, 5, torch.float64)
    every = value_and_grads(one_pass(norm, some_patches, 2), *inputs)[1]
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    out = one_pass(norm, some_patches, 2)(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(weights)
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(4)]
    assert torch.equal(leaves[wanted].grad, every[wanted])


@pytest.mark.parametrize("norm", NORMS)
def test_plain_and_filled_with_zeros(norm, some_patches):
    x = torch.randn(some_patches.rows(2), 5)
    ours = one_pass(norm, some_patches, 2)(x, None, None, None)
    assert torch.equal(ours, two_passes(norm, some_patches, 2)(x, None, None, None))


def test_nothing_of_the_size_of_the_maps_is_kept(some_patches):
    inputs = [t.requires_grad_() for t in samples(some_patches, 2, 5, torch.float32)]
    for norm in ("batch", "layer"):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            one_pass(norm, some_patches, 2)(*inputs)
        assert [t.data_ptr() for t in kept if t.numel() >= inputs[0].numel()] == [inputs[0].data_ptr()]


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_under_autocast(dtype, norm, backend, some_patches):
    x, fill, w, b = samples(some_patches, 2, 5, torch.float32)
    x, fill = x.to(dtype), fill.to(dtype)
    with torch.autocast("cpu", dtype=dtype), sf.use_backend(backend, "norm"):
        out, grads = value_and_grads(one_pass(norm, some_patches, 2, statistics(w[None])), x, fill, w, b)
    assert [t.dtype for t in (out, *grads)] == [dtype, dtype, dtype, torch.float32, torch.float32]
    exact = pytorchs(norm, some_patches, 2)(*(t.double() for t in (x, fill, w, b)))
    own = pytorchs(norm, some_patches, 2)(*(t.float() for t in (x, fill, w, b))).to(dtype)
    assert_as_exact(out, own, exact, "forward", 3 * x.shape[0])


def test_bad_arguments_are_named(some_patches):
    x = torch.randn(some_patches.rows(2), 3)
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="layer_norm_scatter: features must be"):
        layer_norm_scatter(x[1:], some_patches, 2)
    with pytest.raises(TypeError, match="batch_norm_scatter: patches must be"):
        batch_norm_scatter(x, some_patches.active, 2, None, ones, ones)
    with pytest.raises(ValueError, match="layer_norm_scatter: fill must have shape"):
        layer_norm_scatter(x, some_patches, 2, torch.zeros(4))
    with pytest.raises(TypeError, match=r"batch_norm_scatter: fill is torch\.float64"):
        batch_norm_scatter(x, some_patches, 2, ones.double(), ones, ones)
    with pytest.raises(ValueError, match="layer_norm_scatter: weight must have one value"):
        layer_norm_scatter(x, some_patches, 2, None, torch.ones(4))
    with pytest.raises(ValueError, match="batch_norm_scatter: training=False needs"):
        batch_norm_scatter(x, some_patches, 2, None, None, None)
    nothing = sf.ActivePatches(torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="batch_norm_scatter: training needs at least 2 active pixels"):
        batch_norm_scatter(torch.empty(0, 3), nothing, 2, None, None, None, training=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("side", "channels"), CASES)
def test_triton_equals_pytorchs(side, channels, dtype, norm, some_patches, on_triton):
    check(norm, some_patches, side, channels, dtype, on_triton)


def check_bits(norm, patches, side, channels, dtype, device, fill=True):
    """One pass gives what the kernels of two do."""
    patches = sf.ActivePatches(patches.active.to(device))
    inputs = samples(patches, side, channels, dtype, device)
    if not fill:
        inputs[1] = None
    running = [statistics(inputs[0]) for _ in "12"]
    ours, our_grads = value_and_grads(one_pass(norm, patches, side, running[0]), *inputs)
    theirs, their_grads = value_and_grads(two_passes(norm, patches, side, running[1]), *inputs)
    assert all(torch.equal(a, b) for a, b in zip((ours, *our_grads), (theirs, *their_grads), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*running, strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fill", [True, False])
def test_triton_on_any_mask(fill, norm, patches, on_triton):
    needs_rows(norm, patches)
    check_bits(norm, patches, 2, 5, torch.float32, on_triton, fill)
    check_bits(norm, patches, 3, 33, torch.bfloat16, on_triton, fill)


@pytest.mark.parametrize("number", range(3))
def test_triton_in_every_configuration(number, some_patches, monkeypatch, on_triton):
    from spark_fast.ops.norm import configs, triton

    monkeypatch.setattr(triton, "MOST_PARTS", 3)
    with tuning.forced({**configs.BATCH[number], **configs.LAYER[number]}):
        for norm in NORMS:
            check(norm, some_patches, 5, 130, torch.float32, on_triton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_in_chunks_of_channels(dtype, some_patches, monkeypatch, on_triton):
    from spark_fast.ops.norm import triton

    monkeypatch.setattr(triton, "MOST_CHANNELS", 32)
    monkeypatch.setattr(triton, "CHUNK", 32)
    check("layer", some_patches, 2, 65, dtype, on_triton)
    check_bits("layer", some_patches, 2, 65, dtype, on_triton)


@pytest.mark.parametrize("norm", NORMS)
def test_triton_copies_nothing(norm, some_patches, monkeypatch, on_triton):
    """It writes maps itself, and reads their gradient."""
    from spark_fast.ops.densify import triton

    def refuse(*_):
        raise AssertionError("a copy")

    for name in ("gather", "scatter"):
        monkeypatch.setattr(triton, name, refuse)
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    value_and_grads(one_pass(norm, patches, 2), *samples(patches, 2, 5, torch.float32, on_triton))


@pytest.mark.parametrize("norm", NORMS)
def test_triton_reads_each_gradient_where_it_belongs(norm, some_patches, on_triton):
    """NaN at masked pixels stays out of the rows' gradients, NaN at active ones out of the fill's, in any layout."""
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    inputs = [t.requires_grad_() for t in samples(patches, 2, 5, torch.float32, on_triton)]
    out = one_pass(norm, patches, 2)(*inputs)
    active = patches.active[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    upstream = torch.randn(out.shape, device=on_triton)
    plain, at_masked, at_active = (
        torch.autograd.grad(out, inputs, g, retain_graph=True)
        for g in (
            upstream.contiguous(memory_format=torch.channels_last),
            upstream.masked_fill(~active, torch.nan),
            upstream.masked_fill(active, torch.nan),
        )
    )
    assert all(torch.equal(plain[i], at_masked[i]) for i in (0, 2, 3)) and at_masked[1].isnan().all()
    assert torch.equal(plain[1], at_active[1]) and at_active[3].isnan().all()


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_triton_repeats_bit_for_bit(norm, some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    inputs = samples(patches, 8, 24, torch.float32, on_triton)
    first, again = ((y, *g) for y, g in (value_and_grads(one_pass(norm, patches, 8), *inputs) for _ in "12"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("norm", ["evaluating", "layer"])
def test_triton_without_rows_channels_or_images(norm, on_triton):
    for mask, channels in (((2, 2, 3), 5), ((1, 2, 2), 0), ((0, 2, 2), 5)):
        patches = sf.ActivePatches(torch.zeros(mask, dtype=torch.bool, device=on_triton))
        out, grads = value_and_grads(
            one_pass(norm, patches, 2), *samples(patches, 2, channels, torch.float32, on_triton)
        )
        assert out.shape == (mask[0], channels, 2 * mask[1], 2 * mask[2])
        assert not grads[2].any() and not grads[3].any()


def test_triton_leaves_float64_to_the_library(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    x = torch.randn(patches.rows(1), 3, dtype=torch.float64, device=on_triton)
    with pytest.raises(sf.BackendError, match="float64"):
        layer_norm_scatter(x, patches, 1)
