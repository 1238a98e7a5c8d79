"""The patch loss: against the formula on all patches, in every dtype."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, assert_as_exact, value_and_grads

from spark_fast import use_backend
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
    from spark_fast import ActivePatches

    patches = ActivePatches(torch.tensor([[[True, False]]]))
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
