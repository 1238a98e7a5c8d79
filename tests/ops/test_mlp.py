"""mlp: every backend against PyTorch's own layers in float64, in every dtype and instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import tuning
from spark_fast.ops.mlp import configs, mlp

BACKENDS = ["cpu", "library", "reference"]
NAMES = ("features", "weight1", "bias1", "weight2", "bias2")
# rows, channels, hidden, out; the last two are more than one block of rows for a thread, and for two
SHAPES = [(1, 1, 1, 1), (0, 3, 5, 2), (7, 3, 65, 4), (13, 65, 7, 33), (300, 16, 64, 16), (40, 600, 130, 9)]
SHAPES += [(1000, 8, 33, 40), (1700, 5, 16, 3)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param, "mlp"):
        yield request.param


def make(shape, dtype, device="cpu"):
    rows, channels, hidden, out = shape
    generator = torch.Generator().manual_seed(3)
    sizes = ((rows, channels), (hidden, channels), (hidden,), (out, hidden), (out,))
    scales = (1, channels**-0.5, 1, hidden**-0.5, 1)
    tensors = (
        torch.randn(s, generator=generator, dtype=torch.float64) * by for s, by in zip(sizes, scales, strict=True)
    )
    return [t.to(device, dtype) for t in tensors]


def pytorchs(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def check(shape, dtype, device="cpu"):
    inputs = make(shape, dtype, device)
    ours, our_grads = value_and_grads(mlp, *inputs)
    theirs, their_grads = value_and_grads(pytorchs, *inputs)
    oracle, grads = value_and_grads(pytorchs, *(t.double() for t in inputs))
    assert ours.dtype == dtype
    rows, channels, hidden, out = shape
    steps = 8  # of the GELU's formula
    assert_as_exact(ours, theirs, oracle, "forward", channels + hidden + steps)
    # Of the sums that lead to each gradient: before and behind the GELU, and the last one.
    inner = channels + out + steps
    terms = (inner + hidden, inner + rows, inner + rows, channels + rows + steps, rows)
    for name, mine, own, true, n in zip(NAMES, our_grads, their_grads, grads, terms, strict=True):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, true, f"grad {name}", n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorchs(shape, dtype, backend):
    check(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, instruction_set):
    check(shape, torch.float32)


def test_gradcheck(backend):
    inputs = [t.requires_grad_() for t in make((13, 5, 7, 4), torch.float64)]
    assert torch.autograd.gradcheck(mlp, inputs)


def gelu(x):
    """Of single values: the products are exact."""
    one = x.new_ones(1, 1)
    return mlp(x[:, None], one, None, one, None)[:, 0]


def exact_gelu(x):
    return x * torch.special.erfc(-x * 0.5**0.5) / 2


def test_the_gelu_in_float32(instruction_set):
    x = torch.linspace(-14, 14, 2_000_001)
    out, (slope,) = value_and_grads(lambda x: gelu(x), x)
    true = exact_gelu(x.double())
    # A dozen roundings, and in the exponential one of its argument x^2 / 2, one of a constant and one of their product.
    allowed = true.abs() * (12 + 1.25 * x.double() ** 2) * 2**-24
    allowed[x < -12.9] = 4e-37  # all of it
    assert ((out.double() - true).abs() <= allowed).all()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
    wide = x.double().requires_grad_()
    (true_slope,) = torch.autograd.grad(exact_gelu(wide), wide, weights.double())
    assert ((slope.double() - true_slope).abs() <= weights.abs().double() * 4 * 2**-24).all()


def test_the_gelu_in_float64(instruction_set):
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), exact_gelu(x), rtol=1e-14, atol=0)
    (slope,), (theirs,) = (value_and_grads(f, x)[1] for f in (gelu, exact_gelu))
    torch.testing.assert_close(slope, theirs, rtol=1e-14, atol=1e-15)


# PyTorch's own vectors turn infinity into NaN; its formula does not.
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_infinity_and_nan_as_the_formula_has_it(name, dtype):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e30, -1e30], dtype=dtype, requires_grad=True)
    with use_backend(name, "mlp"):
        out = gelu(x)
        out.sum().backward()
    expected = torch.tensor([inf, nan, nan, 0.0, 0.0, 1e30, 0.0], dtype=dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    slopes = torch.tensor([nan, nan, nan, 0.5, 0.5, 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(x.grad, slopes, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_in_its_row(backend):
    x, *weights = make((50, 5, 40, 6), torch.float32)
    x[4, 1] = torch.nan
    out = mlp(x, *weights)
    assert out[4].isnan().all() and out[[*range(4), *range(5, 50)]].isfinite().all()


def test_threads_do_not_change_the_result():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = value_and_grads(mlp, *make((5000, 9, 33, 7), torch.float32))
            results.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("without", [("bias1",), ("bias2",), ("bias1", "bias2")], ids=str)
def test_without_biases(without, backend):
    tensors = make((13, 5, 7, 4), torch.float64)
    given = [None if name in without else t for name, t in zip(NAMES, tensors, strict=True)]
    ours, theirs = (value_and_grads(f, *given) for f in (mlp, pytorchs))
    torch.testing.assert_close(ours, theirs)


def grads_of(inputs, wanted):
    leaves = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    mlp(*leaves).square().sum().backward()
    return [t.grad for t in leaves]


@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=5) if any(w)], ids=str)
def test_only_the_wanted_gradients(wanted, backend):
    inputs = make((13, 5, 7, 4), torch.float64)
    for mine, whole, w in zip(grads_of(inputs, wanted), grads_of(inputs, [True] * 5), wanted, strict=True):
        assert torch.equal(mine, whole) if w else mine is None


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (NAMES, ["features", "hidden", "weight1", "weight2"]),
        (["features"], ["hidden", "weight1", "weight2"]),
        (["weight1", "bias1"], ["features", "hidden", "weight2"]),
        (["weight2"], ["hidden", "weight2"]),
        (["bias2"], []),
        ([], []),
    ],
    ids=str,
)
def test_only_what_is_needed_is_kept(wanted, kept, backend):
    """In particular not what comes out of the GELU."""
    tensors = [t.requires_grad_(n in wanted) for n, t in zip(NAMES, make((13, 5, 7, 4), torch.float32), strict=True)]
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        mlp(*tensors)
    places = {t.data_ptr(): name for name, t in zip(NAMES, tensors, strict=True)}
    assert sorted(places.get(t.data_ptr(), "hidden") for t in found) == sorted(kept)
    for t in found:
        if t.data_ptr() not in places:
            torch.testing.assert_close(t, F.linear(*tensors[:3]))


def test_nothing_is_kept_without_gradients(backend, monkeypatch):
    from spark_fast.ops import backend as backends

    tensors = [t.requires_grad_() for t in make((13, 5, 7, 4), torch.float32)]
    run, asked = backends.select("mlp", torch.device("cpu")), []
    real = run.forward
    monkeypatch.setattr(run, "forward", lambda *args: asked.append(args[-1]) or real(*args))
    with torch.no_grad():
        mlp(*tensors)
    mlp(*(t.detach() for t in tensors))
    mlp(*tensors)
    assert asked == [False, False, True]


def strided(tensors):
    x, w1, b1, w2, b2 = tensors
    halves = (torch.stack((b, b * 2), 1)[:, 0] for b in (b1, b2))
    return (x[::2, ::2], w1.t().contiguous().t()[:, ::2], next(halves), w2.t().contiguous().t(), next(halves))


def check_strided(tensors):
    def run(*t):
        return mlp(*t).t().flatten()  # hands a strided gradient back

    inputs = strided(tensors)
    ours, packed = (value_and_grads(run, *of) for of in (inputs, [t.contiguous() for t in inputs]))
    torch.testing.assert_close(ours, packed)


def test_strided_inputs_and_gradients(backend):
    check_strided(make((26, 8, 14, 6), torch.float32))


def test_a_lazily_negated_tensor_is_not_misread(backend):
    x, *weights = make((13, 5, 7, 4), torch.float64)
    torch.testing.assert_close(mlp(torch._neg_view(x), *weights), pytorchs(-x, *weights))


def test_the_hidden_rows_are_not_changed_by_the_backward_pass(backend):
    inputs = [t.requires_grad_() for t in make((13, 5, 7, 4), torch.float32)]
    out = mlp(*inputs)
    first, again = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_autocast_uses_its_dtype_and_gives_gradients_in_the_parameters():
    inputs = [t.requires_grad_() for t in make((13, 65, 7, 5), torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out, theirs = mlp(*inputs), pytorchs(*inputs)
    assert out.dtype == theirs.dtype == torch.bfloat16 and torch.equal(out, theirs)
    out.sum().backward()
    assert {t.grad.dtype for t in inputs} == {torch.float32}


@pytest.mark.parametrize("shape", [(3, 0, 4, 2), (3, 2, 0, 4), (3, 2, 4, 0), (0, 0, 0, 0), (3, 0, 33, 33)], ids=str)
def test_no_channels(shape, backend):
    inputs = make(shape, torch.float64) if min(shape[1:3]) else [torch.ones(t) for t in sizes(shape)]
    ours, theirs = (value_and_grads(f, *inputs) for f in (mlp, pytorchs))
    torch.testing.assert_close(ours, theirs)


def sizes(shape):
    rows, channels, hidden, out = shape
    return (rows, channels), (hidden, channels), (hidden,), (out, hidden), (out,)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": lambda t: t[0]}, ValueError, "features must be"),
        ({"features": lambda t: t.long()}, TypeError, "features must be floating point"),
        ({"weight1": lambda t: t[:, 1:]}, ValueError, "weight1 must be .* 5 channels"),
        ({"weight1": lambda t: t[0]}, ValueError, "weight1 must be"),
        ({"weight1": lambda t: t.half()}, TypeError, "weight1 is"),
        ({"bias1": lambda t: t[1:]}, ValueError, "bias1 must have shape"),
        ({"bias1": lambda t: t.double()}, TypeError, "bias1 is"),
        ({"weight2": lambda t: t[:, 1:]}, ValueError, "weight2 must be .* 7 hidden"),
        ({"weight2": lambda t: t.to("meta")}, ValueError, "weight2 is on meta"),
        ({"bias2": lambda t: t[:, None]}, ValueError, "bias2 must have shape"),
        ({"bias2": lambda t: t.to("meta")}, ValueError, "bias2 is on meta"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    named = dict(zip(NAMES, make((13, 5, 7, 4), torch.float32), strict=True))
    with pytest.raises(error, match=f"mlp: {words}"):
        mlp(*(change.get(name, lambda t: t)(t) for name, t in named.items()))


HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:4], (130, 16, 150, 70)], ids=str)
def test_triton(shape, dtype, on_triton):
    check(shape, dtype, on_triton)


def every_config(dtype, precision="ieee"):
    """A configuration forced serves both directions."""
    found = [c for tiles in (configs.FORWARD, configs.BACKWARD) for c in configs.choices(tiles, dtype, precision)]
    return [config for n, config in enumerate(found) if config not in found[:n]]


@pytest.mark.parametrize(("dtype", "config"), [(d, config) for d in HALVES for config in every_config(d)], ids=str)
def test_triton_in_every_configuration(dtype, config, on_triton):
    with tuning.forced(config):
        check((150, 70, 140, 70), dtype, on_triton)
        check((0, 3, 5, 2), dtype, on_triton)


@pytest.fixture
def tf32():
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("config", [c for c in every_config(torch.float32, "tf32") if c not in configs.PASSES], ids=str)
def test_triton_products_in_tf32_keep_its_precision(config, tf32, on_triton):
    """The interpreter multiplies in float32 all the same; the tiles are those for TF32."""
    inputs = make((150, 70, 140, 70), torch.float32, on_triton)
    with tuning.forced(config):
        ours, our_grads = value_and_grads(mlp, *inputs)
    true, grads = value_and_grads(pytorchs, *(t.double() for t in inputs))
    for mine, exact in zip((ours, *our_grads), (true, *grads), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=4 * 2**-11 * exact.abs().max().item())


@pytest.mark.parametrize("config", [configs.PASSES[0], configs.SMALL], ids=["pass", "product"])
@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=4) if any(w)], ids=str)
def test_triton_only_the_wanted_gradients(wanted, config, on_triton):
    inputs = make((70, 5, 40, 4), torch.float32, on_triton)
    with tuning.forced(config):
        few, all_ = grads_of(inputs, (*wanted, True)), grads_of(inputs, [True] * 5)
    for mine, whole, w in zip(few, all_, (*wanted, True), strict=True):
        assert torch.equal(mine, whole) if w else mine is None


@pytest.mark.parametrize("config", [configs.PASSES[0], configs.SMALL], ids=["pass", "product"])
def test_triton_keeps_what_goes_into_the_gelu_and_repeats_bit_for_bit(config, on_triton):
    inputs = [t.requires_grad_() for t in make((70, 5, 40, 4), torch.float32, on_triton)]
    found = []
    with tuning.forced(config):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            out = mlp(*inputs)
        with torch.no_grad():
            assert torch.equal(mlp(*inputs), out)
        first, again = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    (hidden,) = (t for t in found if t.shape == (70, 40))
    torch.testing.assert_close(hidden, F.linear(*inputs[:3]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("config", [configs.PASSES[0], configs.SMALL], ids=["pass", "product"])
def test_triton_strided_inputs_and_gradients(config, on_triton):
    with tuning.forced(config):
        check_strided(make((26, 8, 14, 6), torch.float32, on_triton))


@pytest.mark.parametrize("config", [configs.PASSES[0], configs.SMALL], ids=["pass", "product"])
def test_triton_without_biases(config, on_triton):
    x, w1, _, w2, _ = make((26, 8, 14, 6), torch.float32, on_triton)
    with tuning.forced(config):
        ours = value_and_grads(mlp, x, w1, None, w2, None)
    torch.testing.assert_close(ours, value_and_grads(pytorchs, x, w1, None, w2, None))


def test_triton_without_channels(on_triton):
    for shape in ((3, 0, 4, 2), (3, 2, 0, 4), (3, 2, 4, 0)):
        inputs = [torch.ones(s, device=on_triton) for s in sizes(shape)]
        for config in (configs.PASSES[0], configs.SMALL):
            with tuning.forced(config):
                ours = value_and_grads(mlp, *inputs)
            torch.testing.assert_close(ours, value_and_grads(pytorchs, *inputs))


def test_triton_leaves_float64_to_the_library(on_triton):
    with pytest.raises(sf.BackendError, match="float64"):
        mlp(*make((4, 3, 5, 2), torch.float64, on_triton))
