"""Random chains of functions on random masks, against two oracles.

Functions of single pixels and of whole images: an image's active pixels alone, (1, C, 1, K), must become what they
become on the sparse batch. Functions of neighbourhoods: the dense function of the zero-filled map, masked again. The
masked pixels are NaN to begin with.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import spark_fast as sf

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def in_groups(f):
    """`f` on the batch and four groups of channels as one dimension."""

    def run(x):
        b, c, h, w = x.shape
        return f(x.reshape(b * 4, c // 4, h, w)).reshape(b, c, h, w)

    return run


def apart(f):
    """`f` on channels of two dimensions."""

    def run(x):
        b, c, h, w = x.shape
        return f(x.view(b, 4, c // 4, h, w)).flatten(1, 2)

    return run


def last(f):
    """`f` on channels last."""
    return lambda x: f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def with_tokens(f):
    """`f` on a sequence of pixels, channels last."""

    def run(x):
        b, c, h, w = x.shape
        return f(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(b, c, h, w)

    return run


def written(view, f):
    """`f` in place on a view of a copy."""

    def run(x):
        x = x * 1
        f(view(x))
        return x

    return run


def attended(x):
    return (x @ x.transpose(1, 2) / x.shape[2]).softmax(-1) @ x


def instance_norm(x):
    """PyTorch's own on the CPU takes a channels-last gradient for a contiguous one (2.14); group norm does not."""
    return F.group_norm(x, x.shape[1]) if isinstance(x, torch.Tensor) else F.instance_norm(x)


def odd(c: int) -> torch.Tensor:
    return torch.linspace(-1, 1, c, dtype=torch.float64)


# Each takes (B, C, H, W), C a multiple of 4, and gives it again.
PIXELS = {
    "relu": lambda x: F.relu(x) - 0.1,
    "gelu, scaled": lambda x: F.gelu(x) * odd(x.shape[1])[:, None, None],
    "copied channels last": last(lambda x: (x * 1).contiguous().mul_(0.5)),
    "layer norm": last(lambda x: F.layer_norm(x, x.shape[-1:])),
    "linear": last(lambda x: F.linear(x, torch.outer(odd(x.shape[-1]), odd(x.shape[-1])), odd(x.shape[-1]))),
    "group norm": lambda x: F.group_norm(x, 2, odd(x.shape[1])),
    "instance norm": lambda x: instance_norm(x),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "gate of maxima": lambda x: x - x.amax((-1, -2), keepdim=True).tanh(),
    "gate of minima": lambda x: x + F.adaptive_max_pool2d(-x, 1),
    "standard deviation": lambda x: x / (x.std((2, 3), keepdim=True, unbiased=False) + 1),
    "response norm": lambda x: x + x * F.normalize(torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True), dim=1),
    "variance of channels": lambda x: x * x.var(1, keepdim=True),
    "softmax of channels": lambda x: x.softmax(1) + x,
    "unit length": lambda x: F.normalize(x) + x,
    "maximum of channels": lambda x: x - x.max(dim=1, keepdim=True).values,
    "conditions": lambda x: torch.where((x > 0).logical_and(x < 1), x, -x / 2),
    "shuffle": lambda x: F.channel_shuffle(x, 4),
    "shuffle by hand": apart(lambda x: x.transpose(1, 2).contiguous()),
    "groups centred": apart(lambda x: x - x.mean(2, keepdim=True)),
    "groups weighed": apart(lambda x: x * x.mean((-2, -1), keepdim=True).softmax(1)),
    "groups turned": apart(lambda x: torch.stack(x.unbind(1)[::-1], dim=1)),
    "joined, softmax": in_groups(lambda x: x.softmax(1) * x),
    "joined, mean": in_groups(lambda x: x - x.mean(1, keepdim=True)),
    "joined, gate": in_groups(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()),
    "joined, deviation": in_groups(lambda x: x / (x.std((1, 2, 3), keepdim=True, unbiased=False) + 1)),
    "halves swapped": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=-3),
    "a gated half": lambda x: F.glu(torch.cat((x, x), 1), dim=1) * 2,
    "every other": lambda x: torch.cat((x[:, ::2], x[:, 1::2]), 1),
    "padded and cut": lambda x: F.pad(x, (0, 0, 0, 0, 2, 1), value=1.0)[:, 1:-2],
    "written to a slice": written(lambda x: x[:, 1:3], lambda x: x.relu_()),
    "written to a view": written(lambda x: x.view(len(x), 4, -1, *x.shape[2:])[:, 1], lambda x: x.mul_(2)),
    "written to channels last": written(lambda x: x.permute(0, 2, 3, 1), lambda x: x.add_(odd(x.shape[-1]))),
    "tokens": with_tokens(lambda x: x - x.mean(1, keepdim=True)),
    "token attention": with_tokens(attended),
    "token weights": with_tokens(lambda x: x * x.softmax(1)),
}
NEEDS_EQUAL = ("token", "tokens")
NEIGHBOURS = {
    "convolution": lambda x: F.conv2d(x, kernel(x, 3), odd(x.shape[1]), padding=1) / 4,
    "dilated": lambda x: F.conv2d(x, kernel(x, 3), padding=2, dilation=2) / 4,
    "depthwise": lambda x: F.conv2d(x, kernel(x, 5)[:, :1], padding=2, groups=x.shape[1]) / 8,
    "pointwise": lambda x: F.conv2d(x, kernel(x, 1)),
    "padded convolution": lambda x: F.conv2d(F.pad(x, (1, 0, 0, 1)), kernel(x, 2)) / 4,
    "reflected": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), kernel(x, 3)) / 4,
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "mean": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "there and back": lambda x: F.interpolate(x, scale_factor=2)[:, :, 1::2, ::2],
    "cells": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "blurred": lambda x: F.interpolate(F.interpolate(x, scale_factor=2.0, mode="bilinear"), scale_factor=0.5),
    "shift": lambda x: x + 1,
}


def kernel(x, size: int) -> torch.Tensor:
    c = x.shape[1]
    return torch.linspace(-1, 1, c * c * size**2, dtype=torch.float64).sin().view(c, c, size, size)


@st.composite
def scenes(draw):
    """A batch without masked pixels, its patches and their side."""
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    side, channels = draw(st.integers(1, 4)), draw(st.sampled_from((4, 8, 12, 16)))
    flags = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    active = torch.tensor([draw(flags) for _ in range(batch)]).view(batch, rows, columns)
    if draw(st.booleans()):  # equal counts
        active = torch.stack([active[0].flatten().roll(i).view(rows, columns) for i in range(batch)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = batch, channels, rows * side, columns * side
    return torch.randn(size, dtype=torch.float64, generator=generator), sf.ActivePatches(active), side


def mask_of(patches: sf.ActivePatches, side: int) -> torch.Tensor:
    """(B, 1, H, W)."""
    return patches.active[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3)


def sparse_of(images, patches, side):
    """A leaf, and its active pixels; the others are NaN."""
    leaf = torch.where(mask_of(patches, side), images, torch.nan).requires_grad_()
    return leaf, sf.SparseTensor.from_dense(leaf, patches)


def chained(names, table, x, after=lambda x: x):
    for name in names:
        x = after(table[name](x))
    return x


@hypothesis.given(scenes(), st.lists(st.sampled_from(sorted(PIXELS)), min_size=1, max_size=5))
@hypothesis.settings(max_examples=300)
def test_pixels_alone(scene, names):
    images, patches, side = scene
    if patches.per_image is None:
        names = [name for name in names if not name.startswith(NEEDS_EQUAL)]
    leaf, x = sparse_of(images, patches, side)
    out = chained(names, PIXELS, x, torch.tanh).to_dense()
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out.sin().sum(), leaf)
    for image in range(len(images)):
        seen = mask_of(patches, side)[image, 0]
        assert not out[image][:, ~seen].any() and not grad[image][:, ~seen].any()
        pixels = images[image][:, seen][None, :, None].requires_grad_()  # (1, C, 1, K)
        if pixels.shape[-1] < 2:  # PyTorch's instance norm wants more than one
            continue
        alone = chained(names, PIXELS, pixels, torch.tanh)
        torch.testing.assert_close(out[image][:, seen], alone[0, :, 0])
        (grad_alone,) = torch.autograd.grad(alone.sin().sum(), pixels)
        torch.testing.assert_close(grad[image][:, seen], grad_alone[0, :, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
@hypothesis.given(scenes(), st.lists(st.sampled_from(sorted(NEIGHBOURS)), min_size=1, max_size=4))
@hypothesis.settings(max_examples=200)
def test_neighbourhoods(scene, names):
    images, patches, side = scene
    leaf, x = sparse_of(images, patches, side)
    out = chained(names, NEIGHBOURS, x).to_dense()
    assert out.isfinite().all()
    mask = mask_of(patches, side)
    images = (images * mask).requires_grad_()
    dense = chained(names, NEIGHBOURS, images * mask, lambda x: x * mask)
    torch.testing.assert_close(out, dense)
    grads = [torch.autograd.grad(o.sin().sum(), i)[0] for o, i in ((out, leaf), (dense, images))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", PIXELS)
def test_each_function_alone(name):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 8, 4, 6, dtype=torch.float64, generator=generator)
    patches = sf.ActivePatches(torch.tensor([[[1, 0, 1], [1, 0, 0]], [[0, 1, 1], [0, 1, 0]]]).bool())
    test_pixels_alone.hypothesis.inner_test((images, patches, 2), [name])
