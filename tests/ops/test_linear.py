"""linear: every backend against the float64 formula, in every dtype and instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads

from spark_fast import use_backend
from spark_fast.ops.linear import linear
from spark_fast.ops.mlp import mlp

# rows, in, out
SHAPES = [(1, 1, 1), (0, 3, 5), (7, 3, 65), (13, 65, 7), (300, 16, 48), (1500, 33, 40), (40, 600, 130)]


def make(shape, dtype):
    rows, channels, out = shape
    generator = torch.Generator().manual_seed(3)
    sizes = ((rows, channels), (out, channels), (out,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def check(shape, dtype):
    inputs = make(shape, dtype)
    ours, our_grads = value_and_grads(linear, *inputs)
    with use_backend("library", "linear"):
        theirs, their_grads = value_and_grads(linear, *inputs)
    with use_backend("reference", "linear"):
        oracle, grads = value_and_grads(linear, *(t.double() for t in inputs))
    assert ours.dtype == dtype
    assert_as_exact(ours, theirs, oracle, "forward", shape[1])
    terms = (shape[2], shape[0], shape[0])
    for what, mine, own, true, n in zip(("input", "weight", "bias"), our_grads, their_grads, grads, terms, strict=True):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, true, f"grad {what}", n)


@pytest.mark.parametrize("backend", ["cpu", "library"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, dtype, backend):
    with use_backend(backend, "linear"):
        check(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, instruction_set):
    check(shape, torch.float32)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make((13, 5, 7), torch.float64)]
    assert torch.autograd.gradcheck(linear, inputs)


def test_threads_do_not_change_the_result():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, grads = value_and_grads(linear, *make((1500, 33, 40), torch.float32))
        results.append((out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_bias_and_strided_inputs_are_not_misread():
    x, w, _ = make((13, 65, 7), torch.float64)
    expected = x @ w.t()
    torch.testing.assert_close(linear(x.t().contiguous().t(), w.t().contiguous().t()), expected)


def test_autocast_uses_its_dtype_and_gives_gradients_in_the_parameters():
    inputs = [t.requires_grad_() for t in make((13, 65, 7), torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(*inputs)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {t.grad.dtype for t in inputs} == {torch.float32}


@pytest.mark.parametrize("shape", [(3, 4, 0), (3, 0, 5), (0, 0, 0), (3, 0, 33)], ids=str)
def test_no_channels(shape):
    rows, channels, out = shape
    x, w, b = (torch.ones(s, requires_grad=True) for s in ((rows, channels), (out, channels), (out,)))
    y = linear(x, w, b)
    assert torch.equal(y, torch.nn.functional.linear(x, w, b))
    y.sum().backward()
    assert [t.grad.shape for t in (x, w, b)] == [t.shape for t in (x, w, b)]


def test_a_lazily_negated_tensor_is_not_misread():
    x, w, _ = make((13, 65, 7), torch.float64)
    torch.testing.assert_close(linear(torch._neg_view(x), w), -(x @ w.t()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, w, b: (x, w[:, 1:], b), ValueError, "channels"),
        (lambda x, w, b: (x[0], w, b), ValueError, "rows"),
        (lambda x, w, b: (x, w.half(), b), TypeError, "weight"),
        (lambda x, w, b: (x, w, b[:-1]), ValueError, "bias"),
        (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        linear(*change(*make((13, 5, 7), torch.float32)))


@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_weight_gradients_of_many_equal_rows(op):
    """All roundings of such a sum have the same sign: those of pieces of 256 rows, and of as many sums as there are."""
    rows = 100_000
    x = torch.full((rows, 4), 0.7)
    first, second = (torch.rand(8, 4) + 0.5), (torch.rand(4, 8) + 0.5)

    def run(x, *weights):
        out = linear(x, weights[0]) if op == "linear" else mlp(x, weights[0], None, weights[1], None)
        return torch.autograd.grad(out, weights, torch.full_like(out, 0.3))

    weights = [w.requires_grad_() for w in (first, second)[: 1 if op == "linear" else 2]]
    with use_backend("cpu", op):
        ours = run(x, *weights)
    exact = [w.detach().double().requires_grad_() for w in weights]
    out = F.linear(x.double(), exact[0])
    out = out if op == "linear" else F.linear(F.gelu(out), exact[1])
    for mine, true in zip(ours, torch.autograd.grad(out, exact, torch.full_like(out, 0.3)), strict=True):
        assert (mine / true - 1).abs().max() <= (256 + rows / 256 + 16) * 2**-24
