"""A folder of small pictures, and the settings of the smallest run that is still a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TINY = {
    "model": "test_resnet",
    "img_size": 64,
    "decoder_width": 32,
    "batch_size": 4,
    "epochs": 4,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 2,
    "checkpoint_every": 100,
    "reconstruct_every": 0,
    "device": "cpu",
    "threads": 1,
}


def draw_photo(seed: int, height: int = 72, width: int = 90) -> Image.Image:
    """Smooth coloured waves."""
    phase = np.random.default_rng(seed).random((3, 3))
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(0.3 * (a * x + b * y) + 6 * c) for a, b, c in phase]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


def fill_folder(folder: Path, count: int = 12) -> Path:
    """count pictures, JPEG and PNG, half of them in a subfolder."""
    (folder / "sub").mkdir(parents=True)
    for index in range(count):
        ending = "png" if index % 3 == 0 else "jpg"
        draw_photo(index).save(folder / ("sub" if index % 2 else ".") / f"{index:02d}.{ending}")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures that no test changes."""
    return fill_folder(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """Twelve pictures for a test to damage."""
    return fill_folder(tmp_path / "photos")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs of this size gain nothing from threads; a run sets their number for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_settings(photos: Path) -> dict:
    """Keyword arguments, all but `out`, of a run of 4 epochs of 3 steps."""
    return {**TINY, "data": photos}


@pytest.fixture
def settings(tiny_settings: dict, tmp_path: Path) -> dict:
    """The same with a folder of the test's own."""
    return {**tiny_settings, "out": tmp_path / "run"}


@pytest.fixture
def command_line() -> Callable[[dict], list[str]]:
    """The command that starts a run with given settings in another process."""

    def build(settings: dict) -> list[str]:
        flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return [sys.executable, "-m", "spark_fast", "pretrain", *flags]

    return build
