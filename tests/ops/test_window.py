"""The geometry of windows: the tables against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spark_fast.ops import triton_launch, window
from spark_fast.ops.window import MASKED, OUTSIDE, Geometry, Window, axis_table
from spark_fast.patches import ActivePatches


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_size_is_pytorchs(ceil_mode):
    for kernel, stride, padding, dilation, size in itertools.product(
        (1, 2, 3, 5), (1, 2, 3), (0, 1), (1, 2), (7, 8, 12)
    ):
        if 2 * padding > kernel or dilation * (kernel - 1) + 1 > size + 2 * padding:
            continue
        window = Window((kernel, kernel), (stride, stride), (padding, padding), (dilation, dilation))
        expected = F.max_pool2d(torch.zeros(1, 1, size, size), kernel, stride, padding, dilation, ceil_mode).shape[2:]
        assert window.out_size((size, size), ceil_mode) == tuple(expected)


def test_transposed_table_inverts_the_forward_one():
    for kernel, stride, padding, dilation in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1, 2), (1, 2)):
        window = Window((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
        length = 12
        out = window.out_size((length, 1))[0]
        if out < 1:
            continue
        grid, offset = axis_table(window, 0, length, out, 1, False)
        forward = np.where(grid < 0, OUTSIDE, grid + offset)
        grid, offset = axis_table(window, 0, length, out, 1, True)
        backward = np.where(grid < 0, OUTSIDE, grid + offset)
        pairs = {(k, o, int(i)) for k in range(kernel) for o, i in enumerate(forward[k]) if i >= 0}
        assert pairs == {(k, int(o), i) for k in range(kernel) for i, o in enumerate(backward[k]) if o >= 0}


def test_neighbors_against_a_map_of_row_numbers(patches):
    side = 2
    geometry = Geometry.of(patches, side, Window((3, 3), (2, 2), (1, 1)))
    gh, gw = patches.grid
    numbers = torch.full((patches.batch, gh * side, gw * side), MASKED)
    for row, (image, r, c) in enumerate(patches.coords.tolist()):
        block = torch.arange(side * side).view(side, side) + row * side * side
        numbers[image, r * side : (r + 1) * side, c * side : (c + 1) * side] = block
    padded = F.pad(numbers, (1, 1, 1, 1), value=OUTSIDE)
    for row, (image, r, c) in enumerate(patches.coords.tolist()):  # side_out is 1
        assert (
            geometry.neighbors[:, row].tolist()
            == padded[image, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].flatten().tolist()
        )


def test_impossible_geometries_are_named(some_patches):
    with pytest.raises(ValueError, match="patch_size"):
        Geometry.of(some_patches, 1, Window((3, 3), (2, 2), (1, 1)), op="conv2d")
    with pytest.raises(ValueError, match="larger than the padded map"):
        Geometry.of(some_patches, 1, Window((9, 9)))
    with pytest.raises(ValueError, match="stride"):
        Window((3, 3), (0, 1))


def test_tables_made_while_a_cuda_graph_is_captured_are_not_kept(monkeypatch):
    monkeypatch.setattr(window, "_whole", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = window.whole_images(3, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = window.whole_images(3, torch.device("cpu"))
    assert kept is not captured and window.whole_images(3, torch.device("cpu")) is kept


@pytest.mark.parametrize(
    ("patches", "side", "stride"), [(2**21, 32, 2), (2**29, 2, 1), (2**30, 1, 1)], ids=["input", "output", "patches"]
)
def test_triton_refuses_more_rows_than_it_can_number(patches, side, stride):
    if triton_launch.unavailable():
        pytest.skip(triton_launch.unavailable())
    from spark_fast.ops.triton_window import window_constant

    coords = torch.zeros(1, 1, dtype=torch.int32).expand(patches, 3)
    many = ActivePatches.from_tables(coords, torch.zeros(1, 1, 1, dtype=torch.int32).expand(patches, 1, 1))
    geometry = Geometry.of(many, side, Window((1, 1), (stride, stride)))
    for transposed in (False, True):
        with pytest.raises(ValueError, match="Use a smaller batch"):
            window_constant(geometry, transposed)
