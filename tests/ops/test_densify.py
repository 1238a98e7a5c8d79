"""Gathering and scattering patches: against the loop over patches, in every dtype."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, value_and_grads

from spark_fast import use_backend
from spark_fast.ops.densify import gather_patches, scatter_patches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [1, 3, 8])
@pytest.mark.parametrize("channels", [1, 7, 65])
def test_gather_equals_the_loop(channels, side, dtype, patches):
    gh, gw = patches.grid
    images = torch.randn(patches.batch, channels, gh * side, gw * side).to(dtype)
    for layout in (images, images.to(memory_format=torch.channels_last), images.transpose(2, 3).contiguous().mT):
        ours, our_grads = value_and_grads(lambda t: gather_patches(t, patches), layout)
        with use_backend("reference"):
            theirs, their_grads = value_and_grads(lambda t: gather_patches(t, patches), layout)
        assert torch.equal(ours, theirs) and torch.equal(our_grads[0], their_grads[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("filled", [True, False])
def test_scatter_equals_the_loop(filled, side, dtype, patches):
    inputs = [torch.randn(patches.rows(side), 7).to(dtype)]
    if filled:
        inputs.append(torch.randn(7).to(dtype))
    ours, our_grads = value_and_grads(lambda *t: scatter_patches(t[0], patches, side, *t[1:]), *inputs)
    with use_backend("reference"):
        theirs, their_grads = value_and_grads(lambda *t: scatter_patches(t[0], patches, side, *t[1:]), *inputs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(our_grads, their_grads)


def test_round_trip_and_gradcheck(patches):
    side = 2
    x = torch.randn(patches.rows(side), 3, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather_patches(scatter_patches(x, patches, side, fill), patches), x)
    assert torch.autograd.gradcheck(lambda *t: scatter_patches(t[0], patches, side, t[1]), (x, fill), fast_mode=True)


def test_masked_pixels_are_not_read(some_patches):
    images = torch.randn(2, 3, 12, 16)
    masked = ~some_patches.active[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = gather_patches(images, some_patches)
    assert torch.equal(before, gather_patches(images.masked_fill(masked, torch.nan), some_patches))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t[0], ValueError, "batch, channels"),
        (lambda t: t[:1], ValueError, "same number of images"),
        (lambda t: t[..., 1:], ValueError, "square patches"),
        (lambda t: t[:, :, :6], ValueError, "square patches"),
        (lambda t: t.to("meta"), ValueError, "meta"),
        (lambda t: t.numpy(), TypeError, "tensor"),
    ],
)
def test_bad_images_are_named(change, error, words, some_patches):
    with pytest.raises(error, match=words):
        gather_patches(change(torch.zeros(2, 3, 12, 16)), some_patches)


def test_bad_fill_is_named(some_patches):
    x = torch.zeros(some_patches.rows(2), 3)
    with pytest.raises(ValueError, match="fill"):
        scatter_patches(x, some_patches, 2, torch.zeros(4))
    with pytest.raises(TypeError, match="fill"):
        scatter_patches(x, some_patches, 2, torch.zeros(3, dtype=torch.float64))
