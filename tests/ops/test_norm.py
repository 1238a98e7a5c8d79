"""Batch and layer norm on rows: every backend against PyTorch's own layers in float64, and the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads
from torch import nn

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import tuning
from spark_fast.ops.norm import batch_apply, batch_norm, batch_norm_dense, layer_norm, layer_scale

BACKENDS = ["cpu", "library", "reference"]
# rows, channels; the last is more than one part of the rows, and no whole number of joined rows
SIZES = [(5, 3), (13, 7), (50, 1), (31, 16), (200, 65), (2100, 24)]
WIDE = [size for size in SIZES if size[1] > 1]
ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}


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


def check_batch_norm(size, dtype, training, affine=True, activation=None, device="cpu", **sampled):
    inputs = [t.to(device) for t in samples(size, affine, dtype, **sampled)]
    at = [[s.to(device) for s in statistics(size[1], t)] for t in (dtype, dtype, torch.float64)]
    settings = dict(training=training, momentum=0.3, activation=activation)
    ours, our_grads = value_and_grads(lambda t, *wb: batch_norm(t, *at[0], *(wb or (None, None)), **settings), *inputs)
    theirs, their_grads = value_and_grads(lambda *t: pytorchs(t[0], *at[1], *t[1:], **settings), *inputs)
    true = [t.double() for t in inputs]
    before = pytorchs(true[0], *(s.clone() for s in at[2]), *true[1:], training=training)  # the activation
    oracle, grads = value_and_grads(lambda *t: pytorchs(t[0], *at[2], *t[1:], **settings), *true)
    assert ours.dtype == dtype
    terms = 3 * size[0] + 6  # a sum for the mean, two for the variance; six steps of the formula
    assert_as_exact(ours, theirs, oracle, "forward", terms, before.abs().max().item() if activation == "silu" else 0)
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
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
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


def check_layer_norm(size, dtype, affine, device="cpu"):
    inputs = [t.to(device) for t in samples(size, affine, dtype)]

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
def test_the_librarys_layer_norm_is_pytorchs_own_result(dtype):
    x, w, b = (torch.randn(s).to(dtype) for s in ((50, 9), (9,), (9,)))
    with use_backend("library", "norm"):
        assert torch.equal(layer_norm(x, w, b), F.layer_norm(x, (9,), w, b))


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


@pytest.mark.parametrize("norm", ["batch", "relu", "relu6", "silu", "evaluating", "layer"])
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


@pytest.mark.parametrize("norm", ["relu6", "silu", "layer"])
def test_the_threads_do_not_matter(norm):
    x, w, b = samples((5000, 24), True, torch.float32)

    def run(*t):
        if norm == "layer":
            return layer_norm(*t)
        return batch_norm(t[0], None, None, *t[1:], training=True, activation=norm)

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_silu_far_from_zero(dtype, instruction_set):
    """Of pixels that are what goes into it, whole vectors of them and rests."""
    far = torch.tensor([-torch.inf, -3e38, -1e30, -1e4, -100, 1e4, 1e30, torch.inf, torch.nan])
    y = torch.cat((torch.linspace(-80, 80, 1601), far)).to(dtype)
    x = y[:, None].expand(-1, 19).contiguous()
    ours, (grad,) = value_and_grads(
        lambda t: batch_apply(t, x.new_zeros(19), x.new_ones(19), False, None, None, "silu"), x
    )
    theirs, (own,) = value_and_grads(F.silu, x.double())
    close = dict(rtol=16 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny, equal_nan=True)
    torch.testing.assert_close(ours.double(), theirs, **close)
    steep = y.abs() < 80  # where the slope is neither 0 nor 1 to rounding, the two terms of its formula cancel
    torch.testing.assert_close(grad[steep].double(), own[steep], rtol=close["rtol"], atol=16 * torch.finfo(dtype).eps)
    torch.testing.assert_close(grad[-len(far) :].double(), own[-len(far) :], **close)


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


def check_gradients_of_constant_statistics(device="cpu"):
    """Rows and their infinities do not matter to them."""
    x, w = torch.randn(5, 19, device=device), torch.randn(19, device=device)
    mean, var = torch.randn(19, device=device), torch.rand(19, device=device) + 0.5
    wild = x.clone()
    wild[2, 1], wild[3, 18], wild[0, 4] = torch.inf, -torch.inf, torch.nan
    for run in (lambda t: batch_norm(t, mean, var, w), lambda t: layer_scale(t, w), lambda t: layer_scale(t, w, x)):
        (_, (grad,)), (_, (expected,)) = value_and_grads(run, wild), value_and_grads(run, x)
        assert torch.equal(grad, expected) and grad.isfinite().all()


def test_in_evaluation_an_infinite_row_has_the_gradient_of_any_other(backend):
    check_gradients_of_constant_statistics()


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


def pytorchs_with_residual(t, residual, w, b, training, activation, mean=None, var=None):
    return ACTIVATIONS[activation](F.batch_norm(t, mean, var, w, b, training) + residual)


def check_residual(size, dtype, training, activation, device="cpu"):
    x, w, b = (t.to(device) for t in samples(size, True, dtype))
    residual = samples((size[0] + 1, size[1]), False, dtype)[0][1:].to(device)
    stats = [[s.to(device) for s in statistics(size[1], t)] for t in (dtype, dtype, torch.float64)]

    def ours(t, r, *wb):
        return batch_norm(t, *stats[0], *wb, training, activation=activation, residual=r)

    mine, my_grads = value_and_grads(ours, x, residual, w, b)
    (own, own_grads), (true, grads) = (
        value_and_grads(lambda *t: pytorchs_with_residual(*t, training, activation, *at), *inputs)  # noqa: B023
        for at, inputs in (
            (stats[1], (x, residual, w, b)),
            (stats[2], [t.double() for t in (x, residual, w, b)]),
        )
    )
    terms = 3 * size[0] + 6
    assert mine.dtype == dtype
    assert_as_exact(mine, own, true, "forward", terms)
    for name, a, theirs, exact in zip(("input", "residual", "weight", "bias"), my_grads, own_grads, grads, strict=True):
        assert a.dtype == dtype
        assert_as_exact(a, theirs, exact, f"grad {name}", terms)
    for a, theirs, exact in zip(*stats, strict=True):
        assert_as_exact(a, theirs, exact, "running statistics", terms)


@pytest.mark.parametrize("size", [(5, 3), (200, 65)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_is_added_before_the_activation(training, activation, size, backend):
    check_residual(size, torch.float32, training, activation)


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_of_dense_maps(training, backend):
    x, residual = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    stats, w, b = statistics(5, x.dtype), torch.randn(5), torch.randn(5)
    plain = batch_norm_dense(x, *[s.clone() for s in stats], w, b, training)
    out = batch_norm_dense(x, *stats, w, b, training, residual=residual)
    torch.testing.assert_close(out, plain + residual)


def test_a_wrong_residual_is_named():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="residual must have shape"):
        batch_norm(x, None, None, training=True, residual=x[:3])
    with pytest.raises(TypeError, match="residual is"):
        batch_norm(x, None, None, training=True, residual=x.double())
    images = torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match="residual"):
        batch_norm_dense(images, None, None, training=True, residual=images.mT)


def scaled(x, weight, residual=None):
    return x * weight if residual is None else x * weight + residual


def check_layer_scale(size, dtypes, with_residual, device="cpu"):
    x, weight, residual = (samples(size, True, torch.float64)[i] for i in (0, 1, 0))
    inputs = [t.to(dtype).to(device) for t, dtype in zip((x, weight, residual.flip(0)), dtypes, strict=True)]
    inputs = inputs[: 2 + with_residual]
    mine, my_grads = value_and_grads(layer_scale, *inputs)
    own, own_grads = value_and_grads(scaled, *inputs)
    true, grads = value_and_grads(scaled, *(t.double() for t in inputs))
    assert mine.dtype == own.dtype
    largest = (inputs[0].double() * inputs[1].double()).abs().max().item() if size[0] else 0
    assert_as_exact(mine, own, true, "forward", 2, largest)
    for name, a, theirs, exact in zip(("input", "weight", "residual"), my_grads, own_grads, grads, strict=False):
        assert a.dtype == theirs.dtype
        assert_as_exact(a, theirs, exact, f"grad {name}", size[0] + 1)


# features, weight, residual: float32, and what a ConvNeXt has under autocast
SCALES = [
    (torch.float32,) * 3,
    (torch.float64,) * 3,
    (torch.bfloat16,) * 3,
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float64),
    (torch.float32, torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtypes", SCALES, ids=str)
@pytest.mark.parametrize("size", [(0, 3), (1, 1), (13, 7), (200, 65)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_layer_scale(with_residual, size, dtypes, backend):
    check_layer_scale(size, dtypes, with_residual)


@pytest.mark.parametrize("dtypes", [SCALES[0], *SCALES[2:4], (torch.float16, torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_triton_layer_scale(with_residual, dtypes, on_triton):
    check_layer_scale((200, 65), dtypes, with_residual, on_triton)


def test_layer_scale_keeps_its_input_alone(backend):
    x, weight, residual = (torch.randn(s, requires_grad=True) for s in ((13, 7), (7,), (13, 7)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_scale(x, weight, residual)
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [x.data_ptr()]


def test_wrong_arguments_of_layer_scale_are_named():
    x = torch.randn(4, 3)
    for arguments, error, message in (
        ((x[0], x[0]), ValueError, "features must be"),
        ((x, x[0, :2]), ValueError, "weight must have one value"),
        ((x, x[0].long()), TypeError, "weight must be floating"),
        ((x, x[0], x[:3]), ValueError, "residual must have shape"),
        ((x, x[0], x.long()), TypeError, "residual must be floating"),
        ((x, x[0], x.to("meta")), ValueError, "residual is on meta"),
    ):
        with pytest.raises(error, match=f"layer_scale: {message}"):
            layer_scale(*arguments)


HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(5, 3), (13, 7), (50, 1), (200, 65)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_triton_batch_norm(training, size, dtype, on_triton):
    check_batch_norm(size, dtype, training, device=on_triton)


@pytest.mark.parametrize("size", [(13, 7), (2100, 24)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
def test_triton_activations(affine, activation, size, on_triton):
    check_batch_norm(size, torch.float32, True, affine, activation, on_triton)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("training", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)], ids=str
)
def test_triton_residual(training, dtype, activation, on_triton):
    check_residual((200, 65), dtype, training, activation, on_triton)


@pytest.mark.parametrize("number", range(3))
def test_triton_batch_norm_in_every_configuration(number, on_triton):
    from spark_fast.ops.norm import configs

    with tuning.forced(configs.BATCH[number]):
        check_batch_norm((400, 130), torch.float32, True, activation="relu", device=on_triton)
        check_residual((70, 130), torch.float32, True, "relu6", on_triton)


def test_triton_batch_norm_in_many_parts(monkeypatch, on_triton):
    """Every part its own number of tiles, the last tile short: 5 or 6 tiles of 4 rows in each of 7 parts."""
    from spark_fast.ops.norm import triton

    monkeypatch.setattr(triton, "MOST_PARTS", 7)
    with tuning.forced({"TILE": 32, "BLOCK_C": 8, "num_warps": 2}):
        for rows in (150, 152, 3):
            check_batch_norm((rows, 9), torch.float32, True, device=on_triton, mean=30.0)


def test_triton_many_rows_far_from_zero_keep_their_precision(on_triton):
    x = torch.randn(300_000, 3).add(1000).to(on_triton)
    stats = torch.zeros(3, device=on_triton), torch.ones(3, device=on_triton)
    batch_norm(x, *stats, training=True, momentum=1.0)
    torch.testing.assert_close(stats[0].double(), x.double().mean(0), rtol=2**-23, atol=0)
    torch.testing.assert_close(stats[1].double(), x.double().var(0), rtol=2**-20, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_does_not_hide_nan(activation, on_triton):
    for row in (0, 4):  # the first row is the pivot of the sums
        x = torch.randn(9, 3, device=on_triton)
        x[row, 1] = torch.nan
        out = batch_norm(x, None, None, training=True, activation=activation)
        assert out[:, 1].isnan().all() and out[:, [0, 2]].isfinite().all()
        out = layer_norm(x)
        assert out[row].isnan().all() and out[1:4].isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("kink", [0.0, 6.0])
def test_triton_no_gradient_at_the_kinks(kink, activation, on_triton):
    x, w, b = (t.to(on_triton) for t in (torch.randn(9, 3), torch.zeros(3), torch.full((3,), kink)))
    settings = dict(training=True, activation=activation)
    ours = value_and_grads(lambda *t: batch_norm(t[0], None, None, *t[1:], **settings), x, w, b)
    theirs = value_and_grads(lambda *t: pytorchs(t[0], None, None, *t[1:], **settings), x, w, b)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_running_statistics_of_any_kind(dtype, on_triton):
    x = torch.randn(50, 9, device=on_triton)
    mean = torch.zeros(9, 2, dtype=dtype, device=on_triton)[:, 0]
    var = torch.ones(9, dtype=dtype, device=on_triton)
    versions = mean._version, var._version
    batch_norm(x, mean, var, training=True, momentum=0.5)
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(x.dtype).eps)
    torch.testing.assert_close(mean.float(), x.mean(0) / 2, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(var.float(), (1 + x.var(0)) / 2, rtol=tolerance, atol=tolerance)
    assert mean._version > versions[0] and var._version > versions[1]
    before = mean.clone()
    out = batch_norm(x, mean, var, training=False)
    assert torch.equal(mean, before)
    torch.testing.assert_close(out, (x - mean.float()) / (var.float() + 1e-5).sqrt())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(5, 3), (13, 7), (70, 65), (9, 768)], ids=str)
def test_triton_layer_norm(size, dtype, on_triton):
    check_layer_norm(size, dtype, True, on_triton)


@pytest.mark.parametrize("affine", [True, False])
def test_triton_layer_norm_in_chunks_of_channels(affine, monkeypatch, on_triton):
    """Rows too long to be held: pieces of 32 channels, the last one short."""
    from spark_fast.ops.norm import triton

    monkeypatch.setattr(triton, "MOST_CHANNELS", 32)
    monkeypatch.setattr(triton, "CHUNK", 32)
    check_layer_norm((70, 65), torch.float32, affine, on_triton)
    check_layer_norm((13, 130), torch.bfloat16, affine, on_triton)


@pytest.mark.parametrize("number", range(3))
def test_triton_layer_norm_in_every_configuration(number, monkeypatch, on_triton):
    from spark_fast.ops.norm import configs, triton

    monkeypatch.setattr(triton, "MOST_PARTS", 3)
    with tuning.forced(configs.LAYER[number]):
        check_layer_norm((301, 100), torch.float32, True, on_triton)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_triton_half_rows_with_float_weights(norm, dtype, on_triton):
    x, w, b = (t.to(on_triton) for t in (torch.randn(50, 9).to(dtype), torch.randn(9), torch.randn(9)))

    def run(function):
        return lambda *t: (
            function(t[0], None, None, *t[1:], training=True) if norm == "batch" else function(t[0], *t[1:])
        )

    def exact(t, *wb):
        return F.batch_norm(t, None, None, *wb, True) if norm == "batch" else F.layer_norm(t, (9,), *wb)

    mine, grads = value_and_grads(run(batch_norm if norm == "batch" else layer_norm), x, w, b)
    own, own_grads = value_and_grads(lambda *t: exact(*(s.float() for s in t)).to(dtype), x, w, b)
    true, true_grads = value_and_grads(exact, x.double(), w.double(), b.double())
    assert (mine.dtype, *(g.dtype for g in grads)) == (dtype, dtype, torch.float32, torch.float32)
    assert_as_exact(mine, own, true, "forward", 150)
    for name, a, theirs, oracle in zip(("input", "weight", "bias"), grads, own_grads, true_grads, strict=True):
        assert_as_exact(a, theirs, oracle, f"grad {name}", 150)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_triton_strided_inputs_and_gradients(norm, on_triton):
    x, w, b = torch.randn(7, 26).t()[::2], torch.randn(14)[::2], torch.randn(7, 2)[:, 1]
    x, w, b = (t.to(on_triton) for t in (x, w, b))

    def run(*t):
        out = batch_norm(t[0], None, None, *t[1:], training=True) if norm == "batch" else layer_norm(*t)
        return out.t().flatten()

    ours, our_grads = value_and_grads(run, x, w, b)
    packed, packed_grads = value_and_grads(run, x.contiguous(), w.contiguous(), b.contiguous())
    torch.testing.assert_close((ours, *our_grads), (packed, *packed_grads), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_triton_dense_maps_with_a_residual(layout, on_triton):
    x, residual = (torch.randn(2, 5, 3, 4, device=on_triton).contiguous(memory_format=layout) for _ in range(2))
    w, b = (torch.randn(5, device=on_triton) for _ in range(2))
    ours = value_and_grads(lambda t, r, *wb: batch_norm_dense(t, None, None, *wb, True, residual=r), x, residual, w, b)
    theirs = value_and_grads(lambda *t: pytorchs_with_residual(*t, True, None), x, residual, w, b)
    torch.testing.assert_close(ours, theirs)


def test_triton_without_rows_or_channels(on_triton):
    x, w, b = (torch.randn(s, device=on_triton) for s in ((0, 9), (9,), (9,)))
    stats = torch.zeros(9, device=on_triton), torch.ones(9, device=on_triton)
    for run in (layer_norm, lambda *t: batch_norm(t[0], *stats, *t[1:], activation="relu")):
        out, grads = value_and_grads(run, x, w, b)
        assert out.shape == grads[0].shape == (0, 9)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[1:])
    empty = torch.empty(5, 0, device=on_triton)
    assert batch_norm(empty, None, None, training=True).shape == layer_norm(empty).shape == empty.shape


def test_triton_in_evaluation_an_infinite_gradient_stays_in_its_row(on_triton):
    x = torch.randn(5, 3, requires_grad=True, device=on_triton)
    upstream = torch.ones(5, 3, device=on_triton)
    upstream[2, 1] = torch.inf
    batch_norm(x, *(f(3, device=on_triton) for f in (torch.zeros, torch.ones))).backward(upstream)
    finite = x.grad.isfinite()
    assert not finite[2, 1] and finite.sum() == 14


def test_triton_in_evaluation_an_infinite_row_has_the_gradient_of_any_other(on_triton):
    check_gradients_of_constant_statistics(on_triton)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_triton_repeats_bit_for_bit(norm, on_triton):
    inputs = [t.to(on_triton) for t in samples((1000, 24), True, torch.float32)]

    def run(*t):
        return batch_norm(t[0], None, None, *t[1:], training=True) if norm == "batch" else layer_norm(*t)

    first, again = ((out, *grads) for out, grads in (value_and_grads(run, *inputs) for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_triton_leaves_float64_to_the_library(on_triton):
    for run in (layer_norm, lambda t: batch_norm(t, None, None, training=True)):
        with pytest.raises(sf.BackendError, match="float64"):
            run(torch.randn(4, 3, dtype=torch.float64, device=on_triton))
