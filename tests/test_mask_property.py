"""Masks of every kind on random grids and ratios: exact counts, and the same mask from the same seed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import spark_fast as sf

KINDS = {
    "random": sf.random_patch_mask,
    "block": sf.block_patch_mask,
    "grid": sf.grid_patch_mask,
    "mesh": sf.mesh_patch_mask,
}


@given(
    kind=st.sampled_from(sorted(KINDS)),
    batch=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    hidden=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_counts_on_any_grid(kind, batch, grid, hidden, seed):
    patches = grid[0] * grid[1]
    ratio = hidden * (1 - 1 / patches)  # at least one patch stays visible
    draws = [KINDS[kind](batch, grid, ratio, torch.Generator().manual_seed(seed)) for _ in "12"]
    assert torch.equal(*draws) and draws[0].shape == (batch, *grid)
    assert draws[0].sum((1, 2)).tolist() == [sf.keep_count(grid, ratio)] * batch


@given(
    kind=st.sampled_from(sorted(KINDS)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    hidden=st.lists(st.floats(0, 1), max_size=4),
)
def test_one_ratio_per_image(kind, grid, hidden):
    patches = grid[0] * grid[1]
    ratios = [h * (1 - 1 / patches) for h in hidden]
    active = KINDS[kind](len(ratios), grid, torch.tensor(ratios, dtype=torch.float64))
    assert active.shape == (len(ratios), *grid)
    assert active.sum((1, 2)).tolist() == [sf.keep_count(grid, ratio) for ratio in ratios]
