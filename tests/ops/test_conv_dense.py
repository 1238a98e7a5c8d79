"""Convolutions to dense maps (dense_conv2d, project, up_conv2d) against PyTorch's, in float64 and below."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from exactness import DTYPES, assert_as_exact, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops.conv import dense_conv2d, project, up_conv2d
from spark_fast.ops.conv import up as up_module

BACKENDS = ["cpu", "library", "reference"]


def tensors(dtype, *sizes):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [1, 2, 3])
def test_project_on_triton(side, dtype, patches, on_triton):
    patches = sf.ActivePatches(patches.active.to(on_triton))
    inputs = [t.to(on_triton) for t in tensors(dtype, (patches.rows(side), 18), (18,), (20, 18, 3, 3), (20,))]
    pixels = patches.batch * patches.grid[0] * patches.grid[1] * side**2
    terms = (2 * 9 * 18, 9 * 20, 2 * 9 * 20 * pixels, 2 * pixels, pixels)

    def theirs(x, token, w, b):
        return F.conv2d(filled(x + token, token, patches, side), w, b, padding=1)

    check(lambda x, token, w, b: project(x + token, token, patches, side, w, b), theirs, inputs, terms)


def check(ours, theirs, inputs, terms):
    """`ours` and PyTorch's `theirs` on the same inputs; terms: of the sums of the output and of each gradient."""
    mine, my_grads = value_and_grads(ours, *inputs)
    own, own_grads = value_and_grads(theirs, *inputs)
    true, true_grads = value_and_grads(theirs, *(t.double() for t in inputs))
    assert mine.dtype == inputs[0].dtype
    assert_as_exact(mine, own, true, "forward", terms[0])
    for i, (a, b, c, n) in enumerate(zip(my_grads, own_grads, true_grads, terms[1:], strict=True)):
        assert a.dtype == inputs[i].dtype
        assert_as_exact(a, b, c, f"grad of input {i}", n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 16, 40, 6, 10), (1, 17, 16, 5, 4), (3, 3, 7, 4, 4)], ids=str)  # B, C, O, H, W
def test_dense_conv2d(size, dtype, backend):
    batch, channels, out, height, width = size
    inputs = tensors(dtype, (batch, channels, height, width), (out, channels, 3, 3), (out,))
    pixels = batch * height * width
    with use_backend(backend, "conv"):
        terms = (9 * channels, 9 * out, pixels, pixels)
        check(dense_conv2d, lambda x, w, b: F.conv2d(x, w, b, padding=1), inputs, terms)


def test_dense_conv2d_in_every_instruction_set(instruction_set):
    inputs = tensors(torch.float32, (2, 33, 4, 6), (24, 33, 3, 3), (24,))
    check(dense_conv2d, lambda x, w, b: F.conv2d(x, w, b, padding=1), inputs, (9 * 33, 9 * 24, 48, 48))


def filled(features, token, patches, side):
    return sf.SparseTensor(features, patches, side).to_dense(fill=token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("channels", [(18, 20), (3, 5)], ids=str)
def test_project_equals_the_convolution_of_the_filled_map(channels, side, dtype, backend, patches):
    channels, out = channels
    inputs = tensors(dtype, (patches.rows(side), channels), (channels,), (out, channels, 3, 3), (out,))
    pixels = patches.batch * patches.grid[0] * patches.grid[1] * side**2

    # The features are given as distances from the token, so that its gradient does not vanish where all is active.
    def theirs(x, token, w, b):
        return F.conv2d(filled(x + token, token, patches, side), w, b, padding=1)

    def ours(x, token, w, b):
        return project(x + token, token, patches, side, w, b)

    with use_backend(backend, "conv"):
        # Every pixel, not only the masked ones, is a term of the token's gradient and of the result.
        terms = (2 * 9 * channels, 9 * out, 2 * 9 * out * pixels, 2 * pixels, pixels)
        check(ours, theirs, inputs, terms)


def test_project_needs_two_pixels():
    patches = sf.ActivePatches(torch.ones(1, 1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 pixels"):
        project(torch.ones(2, 4), torch.ones(4), patches, 1, torch.ones(4, 4, 3, 3))


def sequence(x, up_weight, up_bias, weight):
    return F.conv2d(F.conv_transpose2d(x, up_weight, up_bias, stride=2, padding=1), weight, padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 16, 18, 32, 4, 6), (1, 24, 24, 16, 2, 2)], ids=str)  # B, C, M, O, H, W
@pytest.mark.parametrize("composed", [True, False])
def test_up_conv2d(size, dtype, composed, monkeypatch):
    batch, channels, middle, out, height, width = size
    monkeypatch.setattr(up_module, "_pays", lambda images, weight: composed)
    inputs = tensors(dtype, (batch, channels, height, width), (channels, middle, 4, 4), (middle,), (out, middle, 3, 3))
    pixels = 4 * batch * height * width
    terms = (
        36 * channels * middle, 36 * middle * out, 9 * pixels * out, 9 * pixels * out, 4 * pixels * channels,
    )  # fmt: skip
    check(up_conv2d, sequence, inputs, terms)


@pytest.mark.parametrize("size", [(2, 16, 16, 16, 3, 4), (1, 5, 7, 3, 2, 2), (64, 16, 16, 16, 4, 4)], ids=str)
def test_up_conv2d_as_it_chooses(size):
    batch, channels, middle, out, height, width = size
    inputs = tensors(
        torch.float64, (batch, channels, height, width), (channels, middle, 4, 4), (middle,), (out, middle, 3, 3)
    )
    assert up_module._pays(inputs[0], inputs[3]) == (batch == 64)
    check(up_conv2d, sequence, inputs, [10_000] * 5)


def test_up_conv2d_leaves_frozen_weights_alone():
    x, up_weight, up_bias, weight = tensors(torch.float64, (64, 16, 4, 4), (16, 16, 4, 4), (16,), (16, 16, 3, 3))
    x.requires_grad_()
    up_conv2d(x, up_weight, up_bias, weight).sum().backward()
    assert x.grad is not None and up_weight.grad is None and weight.grad is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, w, b: (x[0], w, b), ValueError, "images"),
        (lambda x, w, b: (x, w[:, 1:], b), ValueError, "weight"),
        (lambda x, w, b: (x, w[..., 1:], b), ValueError, "weight"),
        (lambda x, w, b: (x, w.half(), b), TypeError, "weight"),
        (lambda x, w, b: (x, w, b[:-1]), ValueError, "bias"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        dense_conv2d(*change(*tensors(torch.float32, (2, 16, 4, 4), (16, 16, 3, 3), (16,))))


UP = ((2, 16, 48, 48), (16, 18, 4, 4), (18,), (16, 18, 3, 3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, u, b, w: (x[0], u, b, w), ValueError, "images"),
        (lambda x, u, b, w: (x, u[..., 1:, 1:], b, w), ValueError, "up_weight"),
        (lambda x, u, b, w: (x, u[1:], b, w), ValueError, "up_weight"),
        (lambda x, u, b, w: (x, u[0], b, w), ValueError, "up_weight"),
        (lambda x, u, b, w: (x, u, b[1:], w), ValueError, "up_bias"),
        (lambda x, u, b, w: (x, u, b, w[:, 1:]), ValueError, "weight"),
        (lambda x, u, b, w: (x, u, b, w.double()), TypeError, "weight"),
    ],
)
def test_bad_arguments_of_up_conv2d_are_named(change, error, words):
    with pytest.raises(error, match=words):
        up_conv2d(*change(*tensors(torch.float32, *UP)))


def test_no_images():
    x, w = torch.ones(0, 16, 4, 4, requires_grad=True), torch.ones(17, 16, 3, 3, requires_grad=True)
    y = dense_conv2d(x, w)
    assert y.shape == (0, 17, 4, 4)
    y.sum().backward()
    assert not w.grad.any()
    assert up_conv2d(x, torch.ones(16, 16, 4, 4), torch.ones(16), w).shape == (0, 17, 8, 8)


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
def test_what_ran_under_another_mode_leaves_nothing_behind(mode):
    batch = 7 if mode is FakeTensorMode else 9  # of no other test
    inputs = tensors(torch.float64, (batch, 17, 6, 6), (18, 17, 3, 3), (18,))
    with mode(), contextlib.suppress(TypeError):  # the compiled kernels refuse a FakeTensor
        dense_conv2d(*(torch.randn(t.shape, dtype=t.dtype) for t in inputs))
    check(dense_conv2d, lambda x, w, b: F.conv2d(x, w, b, padding=1), inputs, [9 * 18 * 36] * 4)
