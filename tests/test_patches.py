from __future__ import annotations

import pytest
import torch

import spark_fast as sf

UNEQUAL = torch.tensor([[[0, 1, 1]], [[0, 0, 0]], [[1, 0, 0]]], dtype=torch.bool)


def test_tables_by_hand():
    patches = sf.ActivePatches(UNEQUAL)
    assert patches.coords.tolist() == [[0, 0, 1], [0, 0, 2], [2, 0, 0]]
    assert patches.grid_to_patch.tolist() == [[[-1, 0, 1]], [[-1, -1, -1]], [[2, -1, -1]]]
    assert (patches.count, patches.per_image, patches.batch, patches.grid) == (3, None, 3, (1, 3))
    assert patches.rows(4) == 48


def test_known_count_gives_the_same_tables():
    active = sf.random_patch_mask(3, (4, 5), 0.7)
    counted, told = sf.ActivePatches(active), sf.ActivePatches(active, per_image=6)
    assert counted.per_image == told.per_image == 6
    assert torch.equal(counted.coords, told.coords) and torch.equal(counted.grid_to_patch, told.grid_to_patch)


def test_complement_is_the_rest():
    patches = sf.ActivePatches(UNEQUAL)
    rest = patches.complement()
    assert torch.equal(rest.active, ~UNEQUAL) and rest.count + patches.count == UNEQUAL.numel()
    assert sf.ActivePatches(sf.random_patch_mask(2, (7, 7), 0.6), 20).complement().per_image == 29


def test_wrong_count_is_caught():
    with pytest.raises(RuntimeError, match="per_image=2"):
        sf.ActivePatches(UNEQUAL, per_image=2)
    with pytest.raises(ValueError, match="per_image"):
        sf.ActivePatches(UNEQUAL, per_image=4)


def test_bad_masks_are_named():
    with pytest.raises(TypeError, match="active must be a bool"):
        sf.ActivePatches(UNEQUAL.int())
    with pytest.raises(TypeError, match="active must be a bool"):
        sf.ActivePatches(UNEQUAL.tolist())
    with pytest.raises(ValueError, match="squeeze"):
        sf.ActivePatches(UNEQUAL[:, None])
    with pytest.raises(ValueError, match="active is on meta"):
        sf.ActivePatches(UNEQUAL.to("meta"))


def test_the_caller_may_change_its_mask():
    mask = UNEQUAL.clone()
    patches = sf.ActivePatches(mask)
    mask.logical_not_()
    assert torch.equal(patches.active, UNEQUAL)


def test_empty_batch():
    patches = sf.ActivePatches(torch.zeros(0, 2, 2, dtype=torch.bool))
    assert patches.count == 0 and sf.SparseTensor.from_dense(torch.zeros(0, 3, 4, 4), patches).shape == (0, 3, 4, 4)
