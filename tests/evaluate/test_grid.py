"""Pictures: the right pixels in the right places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from spark_fast import SparK
from spark_fast.evaluate import draw_loss_curve, reconstruction_grid, save_grid
from spark_fast.evaluate.curve import _ticks
from spark_fast.evaluate.grid import GAP, MASK_GREY, TEXT_HEIGHT

SIDE = 128


class White(nn.Module):
    """Reconstructs every masked pixel as value 1 after de-normalisation with mean 0.5, std 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def random_mask(self, batch: int) -> torch.Tensor:
        return torch.eye(2, dtype=torch.bool).expand(batch, 2, 2)

    def reconstruct(self, images: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        seen = active.repeat_interleave(SIDE // 2, 1).repeat_interleave(SIDE // 2, 2)[:, None]
        return torch.where(seen, images, 2.0)


def tiles(picture: Image.Image, rows: int, named: bool = False) -> np.ndarray:
    """(rows, 3, SIDE, SIDE, 3): the pixels of each tile."""
    pixels, pitch = np.array(picture), SIDE + GAP + (TEXT_HEIGHT if named else 0)
    top = TEXT_HEIGHT * (2 if named else 1)
    return np.stack([
        [pixels[top + r * pitch :, GAP + c * (SIDE + GAP) :][:SIDE, :SIDE] for c in range(3)] for r in range(rows)
    ])  # fmt: skip


def test_original_masked_and_reconstructed_pixels() -> None:
    values = torch.rand(2, 3, SIDE, SIDE)
    picture = reconstruction_grid(White(), (values - 0.5) / 0.25, None, (0.5,) * 3, (0.25,) * 3)
    expected = (values * 255).round().permute(0, 2, 3, 1).numpy()
    half = SIDE // 2
    for row, (original, masked, made) in enumerate(tiles(picture, 2).astype(float)):
        assert np.abs(original - expected[row]).max() <= 1
        for visible in (np.s_[:half, :half], np.s_[half:, half:]):
            assert np.array_equal(masked[visible], original[visible])
            assert np.array_equal(made[visible], original[visible])
        for hidden in (np.s_[:half, half:], np.s_[half:, :half]):
            assert (masked[hidden] == MASK_GREY).all()
            assert (made[hidden] == 255).all()


@pytest.mark.parametrize(("channels", "grey"), [(1, True), (2, True), (3, False), (4, False), (7, True)])
def test_any_number_of_channels(channels: int, grey: bool) -> None:
    images = torch.rand(1, channels, SIDE, SIDE)
    picture = reconstruction_grid(White(), images, None, (0.0,) * channels, (1.0,) * channels)
    original = tiles(picture, 1)[0, 0]
    assert np.allclose(original[..., 0], images[0, 0] * 255, atol=1)
    assert np.array_equal(original[..., 0], original[..., 1]) == grey


def test_values_in_units_of_their_own_are_spread_over_the_grey_scale() -> None:
    images = torch.linspace(-1000, 3000, SIDE * SIDE).view(1, 1, SIDE, SIDE)
    original = tiles(reconstruction_grid(White(), images, None, (0.0,), (1.0,)), 1)[0, 0]
    assert original.min() == 0
    assert original.max() == 255


def test_names_and_errors() -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    plain = reconstruction_grid(White(), images, None, (0.0,) * 3, (1.0,) * 3)
    named = reconstruction_grid(White(), images, None, (0.0,) * 3, (1.0,) * 3, names=["cat", "held out: dog"])
    assert named.height == plain.height + 2 * TEXT_HEIGHT
    assert np.array_equal(tiles(named, 2, named=True), tiles(plain, 2))
    with pytest.raises(ValueError, match="names has 1 entries for 2 images"):
        reconstruction_grid(White(), images, None, (0.0,) * 3, (1.0,) * 3, names=["cat"])
    with pytest.raises(ValueError, match="images has shape"):
        reconstruction_grid(White(), images[:0], None, (0.0,) * 3, (1.0,) * 3)


def test_grid_of_a_real_network(tmp_path: Path) -> None:
    """Non-square, a patch side that is not the stride, training mode kept, batch statistics untouched."""
    model = SparK("test_resnet", img_size=(64, 128), patch_size=64, decoder_width=32, mask_ratio=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_grid(tmp_path / "new" / "grid.png", model, torch.randn(2, 3, 64, 128), None, (0.5,) * 3, (0.25,) * 3)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.size == (3 * 128 + 4 * GAP, TEXT_HEIGHT + GAP + 2 * (64 + GAP))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_small_images_are_enlarged() -> None:
    model = SparK("test_resnet", img_size=64, decoder_width=32)
    picture = reconstruction_grid(model, torch.randn(1, 3, 64, 64), None, (0.5,) * 3, (0.25,) * 3)
    assert picture.width == 3 * 128 + 4 * GAP


@pytest.mark.parametrize(
    "points",
    [[], [(1, 0.9)], [(1, 0.9), (2, 0.9)], [(x, 1 / (x + 1)) for x in range(300)], [(1, None), (2, float("nan"))]],
)
def test_loss_curves_of_any_length(tmp_path: Path, points: list) -> None:
    draw_loss_curve(points, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        drawn = (np.array(picture) == (31, 119, 180)).all(-1).any()
    assert drawn == any(y is not None and y == y for _, y in points)


def test_loss_curve_goes_down_where_the_loss_does(tmp_path: Path) -> None:
    draw_loss_curve([(x, 1 - x / 200) for x in range(101)], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        rows, columns = np.nonzero((np.array(picture) == (31, 119, 180)).all(-1))
    assert rows[columns == columns.min()].max() < rows[columns == columns.max()].min()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.98), (0.9, 0.9), (0, 0), (0, 1600), (1e-7, 2e-7)])
def test_ticks_are_few_round_and_enclose(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]
    assert ticks == sorted(set(ticks))
