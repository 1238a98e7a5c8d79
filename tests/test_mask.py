"""Mask kinds: exact counts on any grid, the pattern that each promises, and randomness from the generator alone."""

from __future__ import annotations

import pytest
import torch
from watching import no_waiting

import spark_fast as sf
from spark_fast.mask import FixedMask, find_mask, is_exact

KINDS = {
    "random": sf.random_patch_mask,
    "block": sf.block_patch_mask,
    "grid": sf.grid_patch_mask,
    "mesh": sf.mesh_patch_mask,
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(active: torch.Tensor) -> list[int]:
    return active.flatten(1).sum(1).tolist()


@every_kind
@pytest.mark.parametrize(
    ("grid", "ratio", "kept"),
    [((7, 7), 0.6, 20), ((12, 12), 0.75, 36), ((3, 5), 0.5, 8), ((1, 1), 0.4, 1), ((2, 2), 0.0, 4)],
)
def test_every_image_keeps_the_rounded_share(kind, grid, ratio, kept):
    active = kind(5, grid, ratio)
    assert active.dtype == torch.bool and active.shape == (5, *grid)
    assert counts(active) == [kept] * 5


@every_kind
def test_a_range_of_ratios(kind):
    """All counts from the one end to the other come up, and the mean is that of the ends."""
    found = counts(kind(4000, (4, 5), (0.25, 0.75), seeded()))
    assert set(found) == set(range(5, 16))
    assert sum(found) / 4000 == pytest.approx(10, abs=5 * 3 / 4000**0.5)  # five deviations: even from 5 to 15 has 2.9
    assert counts(kind(3, (4, 5), (0.5, 0.5))) == [10] * 3


@every_kind
def test_the_generator_decides_and_the_global_state_stays(kind):
    state = torch.get_rng_state()
    for ratio in (0.6, (0.2, 0.8)):
        draws = [kind(4, (7, 7), ratio, seeded(s)) for s in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(kind(4, (7, 7), (0.2, 0.8)), draws[0])


def test_random_masks_are_those_of_before():
    """A seed's masks are part of a run that may be resumed."""
    kept = torch.rand(3, 49, generator=seeded(5)).argsort(1)[:, :20]
    expected = torch.zeros(3, 49, dtype=torch.bool).scatter(1, kept, True).view(3, 7, 7)
    assert torch.equal(sf.random_patch_mask(3, (7, 7), 0.6, seeded(5)), expected)


@every_kind
def test_nothing_waits_for_a_gpu(kind):
    with no_waiting():
        kind(4, (7, 5), 0.6)


@every_kind
def test_the_device_of_a_mask(kind):
    """With no values to be had: nothing depends on them."""
    assert kind(2, (3, 4), 0.5, device="meta").device.type == "meta"
    assert kind(2, (3, 4), 0.5, generator=seeded(), device="meta").device.type == "meta"


@pytest.mark.parametrize("kind", [sf.random_patch_mask, sf.mesh_patch_mask], ids=["random", "mesh"])
def test_patches_are_kept_equally_often(kind):
    active = kind(20000, (4, 4), 0.6, seeded())  # 6 of 16
    share = active.float().mean(0)
    # Five standard deviations of a share of 20000 draws.
    assert (share - 6 / 16).abs().max() < 5 * (6 / 16 * 10 / 16 / 20000) ** 0.5


@pytest.mark.parametrize("kind", [sf.block_patch_mask, sf.grid_patch_mask], ids=["block", "grid"])
def test_no_side_is_preferred(kind):
    active = kind(20000, (6, 6), 0.6, seeded())
    share = active.double().mean(0)
    bound = 5 * (2 * 0.25 / 20000) ** 0.5  # five deviations of the difference of two shares
    for other in (share.flip(0), share.flip(1), share.T):
        assert (share - other).abs().max() < bound


def joints(active: torch.Tensor) -> float:
    """Pairs of neighbours of which both are hidden, per image."""
    hidden = ~active
    return float((hidden[:, 1:] & hidden[:, :-1]).sum() + (hidden[:, :, 1:] & hidden[:, :, :-1]).sum()) / len(active)


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.4), ((12, 12), 0.75), ((7, 7), 0.6), ((16, 9), 0.9)])
def test_blocks_hang_together(grid, ratio):
    """Far more hidden patches than in random masks have a hidden neighbour."""
    block, scattered = (kind(64, grid, ratio, seeded()) for kind in (sf.block_patch_mask, sf.random_patch_mask))
    hidden = grid[0] * grid[1] - sf.keep_count(grid, ratio)
    most = min(2 * hidden, grid[0] * (grid[1] - 1) + grid[1] * (grid[0] - 1))
    assert joints(block) > joints(scattered) + 0.3 * (most - joints(scattered))


def test_one_rectangle_where_it_suffices():
    """A rectangle has a twelfth of the grid, 4 of 49 patches, 3 to 6 once its sides are whole numbers: enough for 3."""
    for active in sf.block_patch_mask(50, (7, 7), 3 / 49, seeded()):
        rows, cols = (~active).any(1).nonzero(), (~active).any(0).nonzero()
        height, width = int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1
        assert 3 <= height * width <= 6


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (4, 8)])
def test_three_quarters_hidden_is_the_lattice(grid):
    active = sf.grid_patch_mask(40, grid, 0.75, seeded())
    for image in active:
        lattices = [torch.zeros(grid, dtype=torch.bool) for _ in range(4)]
        for number, lattice in enumerate(lattices):
            lattice[number // 2 :: 2, number % 2 :: 2] = True
        # On an odd side the four differ in size, the count does not: patches are added or left out.
        assert any(not (image & ~each).any() or not (each & ~image).any() for each in lattices)
        if grid[0] % 2 == 0:
            assert any(torch.equal(image, each) for each in lattices)
    assert len(torch.unique(active, dim=0)) >= 4


@pytest.mark.parametrize(
    ("grid", "ratio", "steps"), [((9, 9), 8 / 9, (3, 3)), ((1, 8), 0.75, (1, 4)), ((8, 12), 5 / 6, (2, 3))]
)
def test_lattices_of_other_ratios(grid, ratio, steps):
    for image in sf.grid_patch_mask(20, grid, ratio, seeded()):
        row, col = (int(i) for i in image.nonzero()[0])
        expected = torch.zeros(grid, dtype=torch.bool)
        expected[row % steps[0] :: steps[0], col % steps[1] :: steps[1]] = True
        assert torch.equal(image, expected)


@pytest.mark.parametrize(("grid", "ratio"), [((8, 8), 0.5), ((7, 7), 0.6), ((6, 5), 0.75), ((7, 7), 0.2)])
def test_mesh_is_one_colour_first(grid, ratio):
    row, col = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    light = (row + col) % 2 == 0
    active = sf.mesh_patch_mask(40, grid, ratio, seeded())
    found = [
        [not (image & ~colour).any() or not (colour & ~image).any() for colour in (light, ~light)] for image in active
    ]
    assert all(any(each) for each in found)
    assert {each.index(True) for each in found} == {0, 1}  # both colours are drawn


@every_kind
def test_pixels_are_a_grid_too(kind):
    active = kind(2, (64, 48), 0.6, seeded())
    assert counts(active) == [sf.keep_count((64, 48), 0.6)] * 2
    patches = sf.ActivePatches(active)
    assert patches.per_image == sf.keep_count((64, 48), 0.6) and patches.rows(1) == 2 * patches.per_image


@every_kind
@pytest.mark.parametrize(
    ("batch", "grid", "ratio", "error", "word"),
    [(1, (7, 7), 1.0, ValueError, "mask_ratio"), (1, (7, 7), -0.1, ValueError, "mask_ratio"),
     (1, (7, 7), float("nan"), ValueError, "mask_ratio"), (1, (7, 7), "0.5", TypeError, "mask_ratio"),
     (1, (2, 1), 0.9, ValueError, "no visible patch"), (1, (0, 3), 0.5, ValueError, "grid"),
     (-1, (2, 2), 0.5, ValueError, "batch"), (1, (7, 7), (0.5, 0.4), ValueError, r"mask_ratio .*\(low, high\)"),
     (1, (7, 7), (0.1, 0.4, 0.5), ValueError, "mask_ratio as a range"),
     (1, (7, 7), (0.5, "1"), TypeError, "mask_ratio"),
     (1, (7, 7), (0.5, 1.0), ValueError, "mask_ratio"), (1, (7, 7), (0.5, 0.999), ValueError, "no visible patch"),
     (2, (7, 7), torch.tensor([0.5]), ValueError, r"one ratio per image, \(2,\).*got \(1,\)"),
     (1, (7, 7), torch.tensor([1]), ValueError, "floating point"),
     (2, (7, 7), torch.tensor([0.5, 1.0]), ValueError, "mask_ratio"),
     (2, (7, 7), torch.tensor([float("nan"), 0.5]), ValueError, "mask_ratio")],
)  # fmt: skip
def test_bad_arguments_are_named(kind, batch, grid, ratio, error, word):
    with pytest.raises(error, match=word):
        kind(batch, grid, ratio)


def test_a_fixed_mask():
    chosen = torch.tensor([[True, False], [False, False]])
    mask = FixedMask(chosen)
    assert mask.mask_ratio == 0.75 and mask.state_dict() == {}
    assert torch.equal(mask(3, (2, 2), 0.1), chosen.expand(3, 2, 2))
    chosen[1, 1] = True  # the caller may go on changing its own
    assert counts(mask(1, (2, 2), 0.75)) == [1]
    assert mask(2, (2, 2), 0.75, device="meta").device.type == "meta"
    for bad, word in [(chosen.int(), "bool"), (chosen[0], "mask as a tensor"), (chosen & False, "0 visible")]:
        with pytest.raises((TypeError, ValueError), match=word):
            find_mask(bad)
    with pytest.raises(ValueError, match=r"\(2, 2\), but the grid of patches is \(3, 2\)"):
        mask(1, (3, 2), 0.75)


def test_names_and_functions():
    assert all(find_mask(name) is kind for name, kind in KINDS.items())
    assert find_mask(torch.rand) is torch.rand
    with pytest.raises(ValueError, match="mask_kind='rnd' is no kind of mask, need one of random, block, grid, mesh"):
        find_mask("rnd", "mask_kind")
    with pytest.raises(TypeError, match="mask must be a name, a function or a bool tensor"):
        find_mask(0.6)


def test_kinds_of_the_users_own(monkeypatch):
    monkeypatch.setattr("spark_fast.mask._KINDS", dict(KINDS))

    @sf.register_mask("left")
    def left(batch, grid, mask_ratio, generator=None, device=None):
        return torch.ones(batch, *grid, dtype=torch.bool, device=device)

    assert find_mask("left") is left and not is_exact(left, 0.5)
    left.exact = True
    assert is_exact(left, 0.5) and not is_exact(left, (0.1, 0.5)) and not is_exact(left, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="name='left' is taken"):
        sf.register_mask("left")
