"""Gathering and scattering patches: against the loop over patches, in every dtype."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, assert_as_exact, value_and_grads

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import tuning
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


def layouts(images):
    """The same images with other strides: channels-last, columns first, a view with gaps, expanded in the batch."""
    holder = images.new_full((*images.shape[:2], 2 * images.shape[2], 3 * images.shape[3]), torch.nan)
    holder[:, :, ::2, ::3] = images
    return (
        images, images.to(memory_format=torch.channels_last), images.transpose(2, 3).contiguous().mT,
        holder[:, :, ::2, ::3], images[:1].expand(images.shape),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), [(1, 65), (3, 7), (8, 1)])
def test_triton_gather_equals_the_loop(channels, side, dtype, some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    images = torch.randn(2, channels, 3 * side, 4 * side).to(on_triton, dtype)
    for layout in layouts(images):
        ours, our_grads = value_and_grads(lambda t: gather_patches(t, patches), layout)
        with use_backend("reference"):
            theirs, their_grads = value_and_grads(lambda t: gather_patches(t, patches), layout)
        assert torch.equal(ours, theirs) and torch.equal(our_grads[0], their_grads[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), [(1, 65), (3, 7), (8, 1)])
@pytest.mark.parametrize("filled", [True, False])
def test_triton_scatter_equals_the_loop(filled, channels, side, dtype, some_patches, on_triton):
    check_scatter(sf.ActivePatches(some_patches.active.to(on_triton)), side, channels, dtype, filled)


def check_scatter(patches, side, channels, dtype, filled):
    inputs = [torch.randn(patches.rows(side), channels).to(patches.device, dtype)]
    if filled:
        inputs.append(torch.randn(channels).to(patches.device, dtype))
    ours, our_grads = value_and_grads(lambda *t: scatter_patches(t[0], patches, side, *t[1:]), *inputs)
    with use_backend("reference"):
        theirs, their_grads = value_and_grads(lambda *t: scatter_patches(t[0], patches, side, *t[1:]), *inputs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_grads[0], their_grads[0])
    torch.testing.assert_close(our_grads[1:], their_grads[1:])


def test_triton_on_any_mask(patches, on_triton):
    patches = sf.ActivePatches(patches.active.to(on_triton))
    gh, gw = patches.grid
    images = torch.randn(patches.batch, 5, 2 * gh, 2 * gw, device=on_triton)
    rows = gather_patches(images, patches)
    with use_backend("reference"):
        assert torch.equal(rows, gather_patches(images, patches))
    check_scatter(patches, 2, 5, torch.float32, True)


@pytest.mark.parametrize("number", range(3))
def test_triton_copies_in_every_configuration(number, some_patches, on_triton):
    from spark_fast.ops.densify import configs

    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    images = torch.randn(2, 300, 15, 20, device=on_triton)
    with tuning.forced(configs.COPY[number]):
        rows = gather_patches(images, patches)
        dense = scatter_patches(rows, patches, 5)
    mask = patches.active[:, None].repeat_interleave(5, 2).repeat_interleave(5, 3)
    assert torch.equal(dense, images * mask)
    with use_backend("reference"):
        assert torch.equal(rows, gather_patches(images, patches))


def test_triton_does_not_read_masked_pixels(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    images = torch.randn(2, 3, 12, 16, device=on_triton)
    masked = ~patches.active[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = gather_patches(images, patches)
    assert torch.equal(before, gather_patches(images.masked_fill(masked, torch.nan), patches))


def check_sum(patches, side, channels, dtype):
    """Of any layout, NaN at active pixels; the same bits in every run."""
    from spark_fast.ops.densify import reference, triton

    maps = torch.randn(patches.batch, channels, *(side * g for g in patches.grid)).to(patches.device, dtype)
    active = patches.active[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3)
    theirs, true = (reference.sum_masked(m, patches) for m in (maps, maps.double()))
    for layout in layouts(maps.masked_fill(active, torch.nan))[:3]:
        ours, again = (triton.sum_masked(layout, patches) for _ in "12")
        assert torch.equal(ours, again) and ours.dtype == dtype
        assert_as_exact(ours, theirs, true, "sum", maps.numel() // channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels"), [(1, 65), (3, 7), (4, 130)])
def test_triton_sum_of_masked_pixels(channels, side, dtype, some_patches, on_triton):
    check_sum(sf.ActivePatches(some_patches.active.to(on_triton)), side, channels, dtype)


def test_triton_sum_of_masked_pixels_of_any_mask(patches, on_triton):
    check_sum(sf.ActivePatches(patches.active.to(on_triton)), 3, 7, torch.float32)


@pytest.mark.parametrize("number", range(3))
def test_triton_sum_of_masked_pixels_in_every_configuration(number, some_patches, on_triton):
    """In 14 parts."""
    from spark_fast.ops.densify import configs

    config = {**configs.COPY[number], "TILE": configs.COPY[number]["TILE"] // 4}
    with tuning.forced(config):
        check_sum(sf.ActivePatches(some_patches.active.to(on_triton)), 3, 130, torch.float32)


def test_triton_leaves_integers_to_the_library(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    with pytest.raises(sf.BackendError, match="int64"):
        gather_patches(torch.zeros(2, 3, 6, 8, dtype=torch.int64, device=on_triton), patches)
