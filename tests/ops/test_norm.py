"""Batch and layer norm on rows: every backend against PyTorch's own layers in float64, and the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads
from torch import nn

from spark_fast import use_backend
from spark_fast.ops.norm import batch_norm, batch_norm_dense, layer_norm

BACKENDS = ["cpu", "library", "reference"]
# rows, channels; the last is more than one part of the rows, and no whole number of joined rows
SIZES = [(5, 3), (13, 7), (50, 1), (31, 16), (200, 65), (2100, 24)]
WIDE = [size for size in SIZES if size[1] > 1]
ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param, "norm"):
        yield request.param


def samples(size, affine, dtype, spread=3.0, mean=1.0):
    generator = torch.Generator().manual_seed(size[0] + size[1])

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [draw(size[1]), draw(size[1])] if affine else []
    return [t.to(dtype) for t in (draw(*size) * spread + mean, *weights)]


def statistics(channels, dtype):
    generator = torch.Generator().manual_seed(channels)
    mean, var = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    return [mean.to(dtype), var.to(dtype)]


def pytorchs(t, mean, var, *wb, training, momentum=0.1, activation=None):
    w, b = wb or (None, None)
    return ACTIVATIONS[activation](F.batch_norm(t, mean, var, w, b, training, momentum))


def check_batch_norm(size, dtype, training, affine=True, activation=None, **sampled):
    inputs = samples(size, affine, dtype, **sampled)
    at = [statistics(size[1], t) for t in (dtype, dtype, torch.float64)]
    settings = dict(training=training, momentum=0.3, activation=activation)
    ours, our_grads = value_and_grads(lambda t, *wb: batch_norm(t, *at[0], *(wb or (None, None)), **settings), *inputs)
    theirs, their_grads = value_and_grads(lambda *t: pytorchs(t[0], *at[1], *t[1:], **settings), *inputs)
    true = [t.double() for t in inputs]
    oracle, grads = value_and_grads(lambda *t: pytorchs(t[0], *at[2], *t[1:], **settings), *true)
    assert ours.dtype == dtype
    terms = 3 * size[0] + 6  # a sum for the mean, two for the variance; six steps of the formula
    assert_as_exact(ours, theirs, oracle, "forward", terms)
    for name, mine, own, exact in zip(("input", "weight", "bias"), our_grads, their_grads, grads, strict=False):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, exact, f"grad {name}", terms)
    for name, mine, own, exact in zip(("mean", "var"), *at, strict=True):
        assert_as_exact(mine, own, exact, f"running {name}", terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_pytorchs(training, affine, size, dtype, backend):
    check_batch_norm(size, dtype, training, affine)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_activation_is_pytorchs(activation, training, size, dtype, backend):
    check_batch_norm(size, dtype, training, activation=activation)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batch_norm_on_every_instruction_set(activation, size, instruction_set):
    check_batch_norm(size, torch.float32, True, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_half_precision(training, dtype, backend):
    check_batch_norm((200, 65), dtype, training)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("kink", [0.0, 6.0])
def test_no_gradient_at_the_kinks(kink, activation, backend):
    x, w, b = torch.randn(9, 3), torch.zeros(3), torch.full((3,), kink)
    settings = dict(training=True, activation=activation)
    ours = value_and_grads(lambda *t: batch_norm(t[0], None, None, *t[1:], **settings), x, w, b)
    theirs = value_and_grads(lambda *t: pytorchs(t[0], None, None, *t[1:], **settings), x, w, b)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden(activation, backend):
    x = torch.randn(9, 3)
    x[4, 1] = torch.nan
    out = batch_norm(x, None, None, training=True, activation=activation)
    assert out[:, 1].isnan().all() and out[:, [0, 2]].isfinite().all()


def test_many_rows_far_from_zero_keep_their_precision():
    # Sums of values or squares kept in float32 would be off by more than the variance of 1.
    x = torch.randn(300_000, 3).add(1000)
    stats = torch.zeros(3), torch.ones(3)
    out, grads = value_and_grads(lambda t, w: batch_norm(t, *stats, w, training=True, momentum=1.0), x, torch.ones(3))
    true = value_and_grads(
        lambda t, w: pytorchs(t, None, None, w, w * 0, training=True), x.double(), torch.ones(3).double()
    )
    torch.testing.assert_close(stats[0].double(), x.double().mean(0), rtol=2**-23, atol=0)
    torch.testing.assert_close(stats[1].double(), x.double().var(0), rtol=2**-22, atol=0)
    torch.testing.assert_close(out.double(), true[0], rtol=0, atol=1000 * 2**-22)
    torch.testing.assert_close(grads[0].double(), true[1][0], rtol=0, atol=1000 * 2**-22)
    torch.testing.assert_close(grads[1].double(), true[1][1], rtol=2**-18, atol=300_000**0.5 * 1000 * 2**-23)


@pytest.mark.parametrize("size", [(2, 1), (200, 65)], ids=str)
def test_batch_norm_equals_batch_norm_1d(size, backend):
    x = torch.randn(size)
    layer = nn.BatchNorm1d(size[1])
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    out = batch_norm(x, mean, var, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close((mean, var), (layer.running_mean, layer.running_var))


# PyTorch's kernel takes one dtype only.
@pytest.mark.parametrize(
    ("name", "dtype"), [(b, d) for b in BACKENDS for d in DTYPES if b != "library" or d == torch.float32], ids=str
)
def test_running_statistics_of_any_kind(name, dtype):
    x = torch.randn(50, 9)
    mean, var = torch.zeros(9, 2, dtype=dtype)[:, 0], torch.ones(9, dtype=dtype)
    versions = mean._version, var._version
    with use_backend(name, "norm"):
        batch_norm(x, mean, var, training=True, momentum=0.5)
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(x.dtype).eps)
    torch.testing.assert_close(mean.float(), x.mean(0) / 2, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(var.float(), (1 + x.var(0)) / 2, rtol=tolerance, atol=tolerance)
    if name != "library":  # PyTorch's kernel does not count
        assert mean._version > versions[0] and var._version > versions[1]
    before = mean.clone()
    with use_backend(name, "norm"):
        batch_norm(x, mean, var, training=False)
    assert torch.equal(mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", WIDE, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_equals_pytorchs(affine, size, dtype, backend):
    check_layer_norm(size, dtype, affine)


@pytest.mark.parametrize("size", WIDE, ids=str)
def test_layer_norm_on_every_instruction_set(size, instruction_set):
    check_layer_norm(size, torch.float32, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_in_half_precision(dtype, backend):
    check_layer_norm((200, 65), dtype, True)


def test_one_channel_is_its_own_mean(backend):
    x, w, b = torch.randn(5, 1), torch.randn(1), torch.randn(1)
    out, grads = value_and_grads(layer_norm, x, w, b)
    torch.testing.assert_close(out, b.expand(5, 1))
    # Nothing but the rounding of the products, times the reciprocal deviation.
    torch.testing.assert_close(grads[0], torch.zeros(5, 1), rtol=0, atol=1e-5**-0.5 * 2**-22)
    torch.testing.assert_close(grads[1], torch.zeros(1), rtol=0, atol=1e-5**-0.5 * 2**-22)


def check_layer_norm(size, dtype, affine):
    inputs = samples(size, affine, dtype)

    def theirs_of(t, *wb):
        return F.layer_norm(t, t.shape[1:], *wb)

    ours, our_grads = value_and_grads(layer_norm, *inputs)
    theirs, their_grads = value_and_grads(theirs_of, *inputs)
    oracle, grads = value_and_grads(theirs_of, *(t.double() for t in inputs))
    assert ours.dtype == dtype
    assert_as_exact(ours, theirs, oracle, "forward", size[1])
    for name, mine, own, true in zip(("input", "weight", "bias"), our_grads, their_grads, grads, strict=False):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, true, f"grad {name}", max(size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_is_pytorchs_own_result(dtype):
    x, w, b = (torch.randn(s).to(dtype) for s in ((50, 9), (9,), (9,)))
    with use_backend("library", "norm"):
        assert torch.equal(layer_norm(x, w, b), F.layer_norm(x, (9,), w, b))
        out = batch_norm(x, None, None, w, b, training=True)
    torch.testing.assert_close(out, F.batch_norm(x, None, None, w, b, training=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_half_rows_with_float_weights_under_autocast(norm, dtype, backend):
    x, w, b = torch.randn(50, 9).to(dtype), torch.randn(9), torch.randn(9)

    def ours(*t):
        return batch_norm(t[0], None, None, *t[1:], training=True) if norm == "batch" else layer_norm(*t)

    def theirs(*t):
        return F.batch_norm(t[0], None, None, *t[1:], True) if norm == "batch" else F.layer_norm(t[0], (9,), *t[1:])

    with torch.autocast("cpu", dtype=dtype):
        (mine, my_grads), (own, own_grads) = value_and_grads(ours, x, w, b), value_and_grads(theirs, x, w, b)
    true, grads = value_and_grads(theirs, x.double(), w.double(), b.double())
    assert (mine.dtype, *(g.dtype for g in my_grads)) == (own.dtype, *(g.dtype for g in own_grads))
    assert_as_exact(mine, own, true, "forward", 50)
    for name, a, c, exact in zip(("input", "weight", "bias"), my_grads, own_grads, grads, strict=True):
        assert_as_exact(a, c, exact, f"grad {name}", 50)


@pytest.mark.parametrize("norm", ["batch", "relu", "relu6", "evaluating", "layer"])
def test_gradcheck(norm, backend):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((9, 4), (4,), (4,)))
    stats = statistics(4, torch.float64)

    def run(*t):
        if norm == "layer":
            return layer_norm(*t)
        if norm == "evaluating":
            return batch_norm(t[0], *stats, *t[1:], activation="relu")
        return batch_norm(t[0], None, None, *t[1:], training=True, activation=None if norm == "batch" else norm)

    assert torch.autograd.gradcheck(run, (x, w, b))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_wanted_gradients(wanted, norm, backend):
    tensors = samples((13, 7), True, torch.float64)

    def grads(function, needs):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        function(*leaves).square().sum().backward()
        return [t.grad for t in leaves]

    def run(*t):
        return batch_norm(t[0], None, None, *t[1:], training=True) if norm == "batch" else layer_norm(*t)

    every = grads(run, (True,) * 3)
    for ours, whole, needed in zip(grads(run, wanted), every, wanted, strict=True):
        assert ours is None if not needed else torch.equal(ours, whole)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_threads_do_not_matter(norm):
    x, w, b = samples((5000, 24), True, torch.float32)

    def run(*t):
        if norm == "layer":
            return layer_norm(*t)
        return batch_norm(t[0], None, None, *t[1:], training=True, activation="relu6")

    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = value_and_grads(run, x, w, b)
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_strided_inputs_and_gradients(norm, backend):
    x, w, b = torch.randn(7, 26).t()[::2], torch.randn(14)[::2], torch.randn(7, 2)[:, 1]

    def run(*t):
        out = batch_norm(t[0], None, None, *t[1:], training=True) if norm == "batch" else layer_norm(*t)
        return out.t().flatten()  # hands a strided gradient back

    ours, our_grads = value_and_grads(run, x, w, b)
    packed, packed_grads = value_and_grads(run, x.contiguous(), w.contiguous(), b.contiguous())
    torch.testing.assert_close((ours, *our_grads), (packed, *packed_grads), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["batch", "relu", "layer"])
def test_the_result_is_fresh_and_only_the_input_is_kept(norm, backend):
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((13, 7), (7,), (7,)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if norm == "layer":
            out = layer_norm(x, w, b)
        else:
            out = batch_norm(x, None, None, w, b, training=True, activation=None if norm == "batch" else norm)
    assert not out._is_view() and out.is_contiguous()
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [x.data_ptr()]
    copy = out.detach().clone()
    out.relu_()
    assert torch.equal(out, copy.relu())
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_dense_maps(training, activation, layout, backend):
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=layout)
    w, b = torch.randn(5), torch.randn(5)
    ours_at, theirs_at = statistics(5, x.dtype), statistics(5, x.dtype)
    settings = dict(training=training, activation=activation)
    ours = value_and_grads(lambda *t: batch_norm_dense(t[0], *ours_at, *t[1:], **settings), x, w, b)
    theirs = value_and_grads(lambda *t: pytorchs(t[0], *theirs_at, *t[1:], **settings), x, w, b)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_at, theirs_at)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_no_channels():
    x = torch.empty(5, 0)
    assert batch_norm(x, None, None, training=True).shape == layer_norm(x).shape == x.shape


def test_no_rows(backend):
    x, w, b = torch.empty(0, 9), torch.randn(9), torch.randn(9)
    for run in (layer_norm, lambda *t: batch_norm(t[0], torch.zeros(9), torch.ones(9), *t[1:], activation="relu")):
        out, grads = value_and_grads(run, x, w, b)
        assert out.shape == grads[0].shape == (0, 9)
        assert all(torch.equal(g, torch.zeros(9)) for g in grads[1:])


def test_bad_arguments_are_named():
    x = torch.randn(4, 3)
    for rows in (0, 1):
        with pytest.raises(ValueError, match="at least 2 active pixels"):
            batch_norm(x[:rows], None, None, training=True)
    with pytest.raises(ValueError, match="running_mean"):
        batch_norm(x, None, None, training=False)
    with pytest.raises(ValueError, match="running_mean"):
        batch_norm(x, torch.zeros(3), None, training=False)
    with pytest.raises(ValueError, match="rows, channels"):
        layer_norm(x[None])
    with pytest.raises(ValueError, match="activation"):
        batch_norm(x, None, None, training=True, activation="gelu")
    with pytest.raises(ValueError, match="weight must have one value for each of the 3 channels"):
        layer_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match="running_var"):
        batch_norm(x, torch.zeros(3), torch.ones(1))
    with pytest.raises(TypeError, match="bias must be floating point"):
        layer_norm(x, torch.ones(3), torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="features must be floating point"):
        layer_norm(x.long())
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        batch_norm_dense(x, None, None, training=True)


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
def test_in_evaluation_an_infinite_gradient_stays_in_its_row(backend):
    x = torch.randn(5, 3, requires_grad=True)
    upstream = torch.ones(5, 3)
    upstream[2, 1] = torch.inf
    with use_backend(backend, "norm"):
        batch_norm(x, torch.zeros(3), torch.ones(3)).backward(upstream)
    finite = x.grad.isfinite()
    assert not finite[2, 1] and finite.sum() == 14


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
def test_a_strided_weight_is_not_misread(backend):
    holder = torch.full((14,), torch.nan)
    holder[::2] = torch.arange(1.0, 8)
    x = torch.randn(9, 7)
    grads = []
    for weight in (holder[::2], holder[::2].clone()):
        at = x.clone().requires_grad_()
        with use_backend(backend, "norm"):
            batch_norm(at, None, None, weight, None, training=True).square().sum().backward()
        grads.append(at.grad)
    assert torch.equal(*grads)
