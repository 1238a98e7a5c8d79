"""The patch loss: against the formula on all patches, in every dtype."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, assert_as_exact, value_and_grads

import spark_fast as sf
from spark_fast import use_backend
from spark_fast.ops import tuning
from spark_fast.ops.patch_loss import patch_loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_equals_the_formula(channels, dtype, patches):
    gh, gw = patches.grid
    shape = (patches.batch, channels, gh * 4, gw * 4)
    prediction, images = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    ours, (our_grad,) = value_and_grads(lambda t: patch_loss(t, images, patches), prediction)
    with use_backend("reference"):
        theirs, (their_grad,) = value_and_grads(lambda t: patch_loss(t, images, patches), prediction)
        oracle, (grad,) = value_and_grads(lambda t: patch_loss(t, images.double(), patches), prediction.double())
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_exact(ours, theirs, oracle, "loss", prediction.numel())
    assert_as_exact(our_grad, their_grad, grad, "grad prediction", 16 * channels)


def test_hand_computed():
    patches = sf.ActivePatches(torch.tensor([[[True, False]]]))
    images = torch.tensor([[9.0, 9, 1, 3], [9, 9, 5, 7]]).view(1, 1, 2, 4)  # masked patch: 1 3 5 7
    mean, var = 4.0, 20 / 3
    expected = sum(((v - mean) / (var + 1e-6) ** 0.5 - 2) ** 2 for v in (1, 3, 5, 7)) / 4
    loss = patch_loss(torch.full_like(images, 2.0), images, patches)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradcheck(some_patches):
    prediction, images = (torch.randn(2, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda p, i: patch_loss(p, i, some_patches), (prediction, images), fast_mode=True)


def test_shapes_must_agree(some_patches):
    with pytest.raises(ValueError, match="same shape"):
        patch_loss(torch.zeros(2, 3, 6, 8), torch.zeros(2, 1, 6, 8), some_patches)


@pytest.mark.parametrize("name", ["cpu", "library"])
def test_strides_are_not_misread(name, some_patches):
    prediction, images = (torch.randn(2, 3, 12, 16) for _ in range(2))
    prediction.requires_grad_()
    with use_backend("reference", "patch_loss"):
        loss = patch_loss(prediction, images, some_patches)
    (grad,) = torch.autograd.grad(loss, prediction)
    layouts = [
        (prediction.contiguous(memory_format=torch.channels_last), images[..., None].expand(2, 3, 12, 16, 2)[..., 0]),
        (prediction.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), images.transpose(2, 3).contiguous().mT),
        (torch.stack((prediction, prediction))[1], torch.zeros(2, 3, 24, 32)),
    ]
    layouts[2][1][:, :, ::2, ::2] = images
    layouts[2] = (layouts[2][0], layouts[2][1][:, :, ::2, ::2])
    for p, i in layouts:
        p = p.detach().requires_grad_()
        with use_backend(name, "patch_loss"):
            again = patch_loss(p, i, some_patches)
        torch.testing.assert_close(again, loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(again, p)[0], grad, rtol=1e-5, atol=1e-8)


def test_an_expanded_prediction(some_patches):
    images, value = torch.randn(2, 3, 12, 16), torch.randn(2, 3, 1, 1, requires_grad=True)
    (ours,) = torch.autograd.grad(patch_loss(value.expand(2, 3, 12, 16), images, some_patches), value)
    with use_backend("reference", "patch_loss"):
        (theirs,) = torch.autograd.grad(patch_loss(value.expand(2, 3, 12, 16), images, some_patches), value)
    torch.testing.assert_close(ours, theirs)


def test_patches_must_fit(some_patches):
    with pytest.raises(ValueError, match="square patches"):
        patch_loss(torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8), some_patches)


def check_triton(shape, dtype, image_dtype, patches):
    prediction = torch.randn(shape, dtype=torch.float64).to(patches.device, dtype)
    images = torch.randn(shape, dtype=torch.float64).to(patches.device, image_dtype)
    ours, (our_grad,) = value_and_grads(lambda t: patch_loss(t, images, patches), prediction)
    with use_backend("reference"):
        theirs, (their_grad,) = value_and_grads(lambda t: patch_loss(t, images, patches), prediction)
        oracle, (grad,) = value_and_grads(lambda t: patch_loss(t, images.double(), patches), prediction.double())
    assert ours.dtype == torch.float32 and our_grad.dtype == dtype
    assert_as_exact(ours, theirs, oracle, "loss", prediction.numel())
    assert_as_exact(our_grad, their_grad, grad, "grad prediction", 16 * shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("image_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "side"), [(1, 2), (3, 4), (5, 7)])
def test_triton_equals_the_formula(channels, side, image_dtype, dtype, some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    check_triton((2, channels, 3 * side, 4 * side), dtype, image_dtype, patches)


def test_triton_on_any_mask(patches, on_triton):
    patches = sf.ActivePatches(patches.active.to(on_triton))
    shape = (patches.batch, 3, 4 * patches.grid[0], 4 * patches.grid[1])
    check_triton(shape, torch.float32, torch.float32, patches)
    check_triton(shape, torch.bfloat16, torch.float32, patches)


@pytest.mark.parametrize("number", range(3))
def test_triton_in_every_configuration(number, some_patches, on_triton):
    from spark_fast.ops.patch_loss import configs

    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    with tuning.forced(configs.PATCH[number]):
        check_triton((2, 3, 120, 160), torch.float32, torch.float32, patches)  # 4800 values: more than a block


def test_triton_reads_large_patches_in_pieces(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    with tuning.forced({"BLOCK": 16, "num_warps": 1}):
        for side in (2, 4, 5):
            check_triton((2, 3, 3 * side, 4 * side), torch.float32, torch.float32, patches)


def test_triton_statistics_far_from_zero(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    images = torch.randn(2, 3, 24, 32, device=on_triton) + 1000
    prediction = torch.randn_like(images)
    loss = patch_loss(prediction, images, patches)
    with use_backend("reference"):
        exact = patch_loss(prediction.double(), images.double(), patches)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


def test_triton_strides_are_not_misread(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    prediction, images = (torch.randn(2, 3, 12, 16, device=on_triton) for _ in range(2))
    holder = torch.full((2, 3, 24, 32), torch.nan, device=on_triton)
    holder[:, :, ::2, ::2] = images
    upstream = torch.tensor(3.0, device=on_triton)

    def both(p, i):
        p = p.detach().requires_grad_()
        loss = patch_loss(p, i, patches)
        return loss.detach(), *torch.autograd.grad(loss, p, upstream)

    with use_backend("reference"):
        expected = both(prediction, images)
    for p, i in (
        (prediction.contiguous(memory_format=torch.channels_last), images.expand(1, 2, 3, 12, 16)[0]),
        (prediction.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), images.transpose(2, 3).contiguous().mT),
        (torch.stack((prediction, prediction), -1)[..., 1], holder[:, :, ::2, ::2]),
    ):
        torch.testing.assert_close(both(p, i), expected, rtol=1e-5, atol=1e-8)
    value = torch.randn(2, 3, 1, 1, device=on_triton)
    ours = value_and_grads(lambda t: patch_loss(t.expand(2, 3, 12, 16), images, patches), value)
    with use_backend("reference"):
        theirs = value_and_grads(lambda t: patch_loss(t.expand(2, 3, 12, 16), images, patches), value)
    torch.testing.assert_close(ours, theirs)


def test_triton_nan(some_patches, on_triton):
    """A visible NaN is not read, and has no gradient; a masked one shows."""
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    prediction, images = (torch.randn(2, 3, 12, 16, device=on_triton) for _ in range(2))
    visible = patches.active[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3).expand(2, 3, 12, 16)
    hidden = [t.masked_fill(visible, torch.nan) for t in (prediction, images)]
    loss, (grad,) = value_and_grads(lambda t: patch_loss(t, hidden[1], patches), hidden[0])
    assert torch.equal(loss, patch_loss(prediction, images, patches)) and not grad[visible].any()
    assert (grad[~visible] != 0).all()
    assert patch_loss(hidden[0].nan_to_num() * torch.nan, images, patches).isnan()


def test_triton_repeats_bit_for_bit(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    prediction, images = (torch.randn(2, 3, 24, 32, device=on_triton) for _ in range(2))
    first, again = (value_and_grads(lambda t: patch_loss(t, images, patches), prediction) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1][0], again[1][0])


def test_triton_leaves_a_gradient_of_the_images_to_the_library(some_patches, on_triton):
    patches = sf.ActivePatches(some_patches.active.to(on_triton))
    prediction, images = (torch.randn(2, 2, 6, 8, device=on_triton) for _ in range(2))
    ours = value_and_grads(lambda p, i: patch_loss(p, i, patches), prediction, images)
    with use_backend("reference"):
        theirs = value_and_grads(lambda p, i: patch_loss(p, i, patches), prediction, images)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(sf.BackendError, match="float64"):
        patch_loss(prediction.double(), images, patches)
