"""The loss against its formula: per-patch normalised targets, masked patches only."""

import pytest
import simulation
import torch
from simulation import Mask, gap, random_mask

import spark_fast as sf
from spark_fast.loss import patch_loss

CASES = [
    (random_mask(3, (2, 3), 2), (32, 48), 3),
    (random_mask(1, (1, 2), 1), (32, 64), 1),
    (random_mask(2, (3, 3), 4), (12, 12), 5),
    (torch.tensor([[[True, False]], [[False, False]], [[True, True]]]), (8, 16), 2),
    (torch.zeros(2, 2, 2, dtype=torch.bool), (8, 8), 3),
]


@pytest.mark.parametrize(("active", "size", "channels"), CASES, ids=lambda v: str(tuple(getattr(v, "shape", (v,)))))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_formula(active, size, channels, dtype, tolerance):
    torch.manual_seed(0)
    images = 3 + 2 * torch.randn(active.shape[0], channels, *size, dtype=torch.float64)
    guess = torch.randn_like(images).requires_grad_()
    truth = simulation.patch_loss(images, guess, active)
    (wanted,) = torch.autograd.grad(truth, guess)
    mine = guess.detach().to(dtype).requires_grad_()
    loss = patch_loss(mine, images.to(dtype), sf.ActivePatches(active))
    (found,) = torch.autograd.grad(loss, mine)
    assert loss.dim() == 0
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=tolerance)
    assert found.dtype == dtype and gap(found, wanted) < 10 * tolerance
    seen = Mask(active).at(*size, dtype).bool().expand_as(found)
    assert not found[seen].any()


def test_visible_pixels_and_their_prediction_do_not_count():
    torch.manual_seed(0)
    active, images, guess = random_mask(2, (2, 2), 2), torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    seen, patches = Mask(active).at(16, 16, torch.float32).bool(), sf.ActivePatches(active)
    loss = patch_loss(guess, images, patches)
    assert torch.equal(loss, patch_loss(torch.where(seen, torch.tensor(9.0), guess), images, patches))
    assert torch.equal(loss, patch_loss(guess, torch.where(seen, torch.tensor(9.0), images), patches))
    assert not torch.equal(loss, patch_loss(torch.where(seen, guess, torch.tensor(9.0)), images, patches))


def test_known_values():
    """A perfect prediction costs 0; predicting 0 costs (n - 1) / n, the mean square of unbiasedly normalised values."""
    torch.manual_seed(0)
    images, active = torch.randn(2, 3, 16, 16).double(), torch.zeros(2, 2, 2, dtype=torch.bool)
    target = simulation.patchify(images, (2, 2))
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    perfect, patches = simulation.unpatchify(target, images.shape), sf.ActivePatches(active)
    assert float(patch_loss(perfect, images, patches)) < 1e-20
    n = 3 * 8 * 8
    assert float(patch_loss(0 * perfect, images, patches)) == pytest.approx((n - 1) / n, rel=1e-5)


def test_a_flat_patch_is_finite():
    images, active = torch.full((1, 3, 8, 8), 7.0), torch.zeros(1, 1, 1, dtype=torch.bool)
    guess = torch.zeros(1, 3, 8, 8, requires_grad=True)
    loss = patch_loss(guess, images, sf.ActivePatches(active))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.isfinite(guess.grad).all()
