from __future__ import annotations

import pytest
import torch

import spark_fast as sf


@pytest.mark.parametrize(
    ("grid", "ratio", "kept"),
    [((7, 7), 0.6, 20), ((12, 12), 0.75, 36), ((3, 5), 0.5, 8), ((1, 1), 0.4, 1), ((2, 2), 0.0, 4)],
)
def test_every_image_keeps_the_rounded_share(grid, ratio, kept):
    active = sf.random_patch_mask(5, grid, ratio)
    assert active.dtype == torch.bool and active.shape == (5, *grid)
    assert active.flatten(1).sum(1).tolist() == [kept] * 5


def test_the_generator_decides_and_the_global_state_stays():
    state = torch.get_rng_state()
    draws = [sf.random_patch_mask(4, (7, 7), 0.6, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.get_rng_state())


def test_patches_are_kept_equally_often():
    active = sf.random_patch_mask(20000, (3, 3), 0.6, torch.Generator().manual_seed(0))  # 4 of 9
    share = active.float().mean(0)
    # Five standard deviations of a share of 20000 draws.
    assert (share - 4 / 9).abs().max() < 5 * (4 / 9 * 5 / 9 / 20000) ** 0.5


@pytest.mark.parametrize(
    ("batch", "grid", "ratio", "word"),
    [(1, (7, 7), 1.0, "mask_ratio"), (1, (7, 7), -0.1, "mask_ratio"), (1, (7, 7), float("nan"), "mask_ratio"),
     (1, (2, 1), 0.9, "no visible patch"), (1, (0, 3), 0.5, "grid"), (-1, (2, 2), 0.5, "batch")],
)  # fmt: skip
def test_bad_arguments_are_named(batch, grid, ratio, word):
    with pytest.raises(ValueError, match=word):
        sf.random_patch_mask(batch, grid, ratio)
