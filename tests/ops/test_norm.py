"""Batch and layer norm on rows: against the formula and PyTorch's own layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads
from torch import nn

from spark_fast import use_backend
from spark_fast.ops.norm import batch_norm, layer_norm

SIZES = [(13, 7), (200, 65)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_the_formula(training, affine, size, dtype):
    channels = size[1]
    x = torch.randn(size, dtype=torch.float64).mul(3).add(5).to(dtype)
    params = [torch.randn(channels, dtype=torch.float64).to(dtype) for _ in range(2 if affine else 0)]
    start = [torch.randn(channels).to(dtype), torch.rand(channels).add(0.5).to(dtype)]

    def run(statistics):
        def call(t, *wb):
            return batch_norm(t, *statistics, *(wb or (None, None)), training=training, momentum=0.3)

        return call

    ours_at, theirs_at, true_at = ([s.clone() for s in start], [s.clone() for s in start], [s.double() for s in start])
    ours, our_grads = value_and_grads(run(ours_at), x, *params)
    with use_backend("reference"):
        theirs, their_grads = value_and_grads(run(theirs_at), x, *params)
        oracle, grads = value_and_grads(run(true_at), x.double(), *(p.double() for p in params))
    assert_as_exact(ours, theirs, oracle, "forward", size[0])
    for name, mine, own, true in zip(("input", "weight", "bias"), our_grads, their_grads, grads, strict=False):
        assert_as_exact(mine, own, true, f"grad {name}", size[0])
    for name, mine, own, true in zip(("mean", "var"), ours_at, theirs_at, true_at, strict=True):
        assert_as_exact(mine, own, true, f"running {name}", size[0])


@pytest.mark.parametrize("size", [(2, 1), *SIZES], ids=str)
def test_batch_norm_equals_batch_norm_1d(size):
    x = torch.randn(size)
    layer = nn.BatchNorm1d(size[1])
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    out = batch_norm(x, mean, var, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close((mean, var), (layer.running_mean, layer.running_var))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layer_norm_equals_the_formula(size, dtype):
    inputs = [torch.randn(s, dtype=torch.float64).to(dtype) for s in (size, size[1:], size[1:])]
    ours, our_grads = value_and_grads(layer_norm, *inputs)
    with use_backend("reference"):
        theirs, their_grads = value_and_grads(layer_norm, *inputs)
        oracle, grads = value_and_grads(layer_norm, *(t.double() for t in inputs))
    assert_as_exact(ours, theirs, oracle, "forward", size[1])
    for name, mine, own, true in zip(("input", "weight", "bias"), our_grads, their_grads, grads, strict=True):
        assert_as_exact(mine, own, true, f"grad {name}", max(size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_pytorchs_own_result(dtype):
    x, w, b = (torch.randn(s).to(dtype) for s in ((50, 9), (9,), (9,)))
    assert torch.equal(layer_norm(x, w, b), F.layer_norm(x, (9,), w, b))
    assert layer_norm(x[:0], w, b).shape == (0, 9)
    out = batch_norm(x, None, None, w, b, training=True)
    torch.testing.assert_close(out, F.batch_norm(x, None, None, w, b, training=True))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradcheck(norm):
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((9, 4), (4,), (4,)))
    run = (lambda *t: batch_norm(t[0], None, None, *t[1:], training=True)) if norm == "batch" else layer_norm
    assert torch.autograd.gradcheck(run, (x, w, b))


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
