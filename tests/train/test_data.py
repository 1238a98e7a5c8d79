"""The stream of batches: which files, which numbers, and what happens when files are bad."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spark_fast.train.config import PretrainConfig
from spark_fast.train.data import (
    Batch,
    ChannelError,
    ImageFolder,
    list_images,
    load_pictures,
    make_loader,
    read_image,
    steps_per_epoch,
)


@pytest.fixture
def config(settings: dict) -> Callable[..., PretrainConfig]:
    return lambda **changes: PretrainConfig(**{**settings, **changes})


def batches(config: PretrainConfig, start: int, stop: int) -> list[Batch]:
    return list(make_loader(config, list_images(config.data), start, stop, pin=False))


def test_listing_is_sorted_nested_and_skips_hidden(own_photos: Path) -> None:
    (own_photos / ".hidden").mkdir()
    shutil.copy(own_photos / "00.png", own_photos / ".hidden" / "a.png")
    shutil.copy(own_photos / "00.png", own_photos / "._00.png")
    shutil.copy(own_photos / "00.png", own_photos / "UPPER.PNG")
    (own_photos / "notes.txt").write_text("x")
    (own_photos / "sub" / "back").symlink_to(own_photos)
    files = list_images(own_photos)
    assert files == sorted(files)
    assert len(files) == 13
    assert "UPPER.PNG" in files
    assert "sub/01.jpg" in files


def test_folder_errors(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        list_images(tmp_path / "missing")
    with pytest.raises(ValueError, match="is not a folder"):
        list_images(photos / "00.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.csv").write_text("x")
    with pytest.raises(ValueError, match=r"holds no image \(2 other files\).*\.jpg.*\.npy"):
        list_images(tmp_path)


def test_fewer_images_than_a_batch(config: Callable) -> None:
    with pytest.raises(ValueError, match=r"12 images, 24 .* batch_size=32. Set epoch_repeats to 3 .* 24 or less"):
        steps_per_epoch(config(batch_size=32, epoch_repeats=2), 12)
    assert steps_per_epoch(config(batch_size=32, epoch_repeats=3), 12) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(config: Callable, workers: int) -> None:
    alone, shared = batches(config(), 0, 7), batches(config(workers=workers), 0, 7)
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, shared, strict=True))


def test_batches_go_on_where_a_run_stopped(config: Callable) -> None:
    whole, rest = batches(config(), 0, 8), batches(config(), 5, 8)  # step 5 is in the middle of epoch 1
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[5:], rest, strict=True))


def test_global_randomness_plays_no_part_and_is_left_alone(config: Callable) -> None:
    torch.manual_seed(1)
    first = batches(config(), 0, 2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    folder = ImageFolder(config(), list_images(config().data))
    folder.__getitems__([(0, 0)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, batches(config(), 0, 2), strict=True))


def test_each_epoch_is_another_permutation(config: Callable) -> None:
    loader = make_loader(config(epoch_repeats=2), list_images(config().data), 0, 12, pin=False)
    steps = list(loader.batch_sampler)
    first, second = ([index for step in part for _, index in step] for part in (steps[:6], steps[6:]))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert {epoch for step in steps[6:] for epoch, _ in step} == {1}


def test_crops_differ_by_epoch_repeat_and_seed(config: Callable) -> None:
    files = list_images(config().data)
    folder, other = ImageFolder(config(), files), ImageFolder(config(seed=1), files)
    images = folder.__getitems__([(0, 3), (1, 3), (0, 3 + len(files))]).images
    images = [*images, *other.__getitems__([(0, 3)]).images]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_flips_happen_with_the_given_probability(config: Callable) -> None:
    files = list_images(config().data)
    plain, flipped = (ImageFolder(config(hflip=p), files).__getitems__([(0, 0)]).images for p in (0.0, 1.0))
    assert torch.allclose(plain.flip(3), flipped)


def test_non_square_images_and_normalisation(config: Callable, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (50, 40), (255, 0, 51)).save(tmp_path / "flat" / "a.png")
    images = ImageFolder(config(data=tmp_path / "flat", img_size=(32, 64)), ["a.png"]).__getitems__([(0, 0)]).images
    assert images.shape == (1, 3, 32, 64)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert images[0, :, 5, 5].tolist() == pytest.approx(expected, abs=1e-5)


def save_and_read(path: Path, image: Image.Image, in_chans: int) -> torch.Tensor:
    image.save(path)
    pixels = read_image(path, in_chans)
    if isinstance(pixels, Image.Image):
        pixels = torch.from_numpy(np.array(pixels)).float() / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return torch.Tensor(pixels)


def test_16_bit_grey_keeps_its_values(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
    for in_chans in (1, 3, 4):
        pixels = save_and_read(tmp_path / "deep.png", Image.fromarray(ramp), in_chans)
        assert pixels.shape == (in_chans, 6, 8)
        for channel in pixels[:3]:
            assert torch.allclose(channel, torch.from_numpy(ramp / 65535).float(), atol=1e-6)
    assert (pixels[3] == 1).all()


def test_float_tiff_is_taken_as_it_is(tmp_path: Path) -> None:
    values = np.linspace(-3, 7, 48, dtype=np.float32).reshape(6, 8)
    assert np.array_equal(save_and_read(tmp_path / "float.tif", Image.fromarray(values), 1)[0].numpy(), values)


def test_grey_of_unknown_scale_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1_000_000, dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="no known scale"):
        read_image(tmp_path / "wide.tif", 1)


def test_palette_and_alpha_images_show_their_colours(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (250, 10, 20))
    image.paste((10, 20, 250), (0, 0, 4, 8))
    for name, kind in (("p.png", image.convert("P", palette=Image.Palette.ADAPTIVE)), ("a.png", image.convert("RGBA"))):
        pixels = save_and_read(tmp_path / name, kind, 3)
        assert torch.allclose(pixels[:, 0, 0] * 255, torch.tensor([10.0, 20.0, 250.0]), atol=1)
        assert torch.allclose(pixels[:, 0, 7] * 255, torch.tensor([250.0, 10.0, 20.0]), atol=1)
    transparent = image.convert("P", palette=Image.Palette.ADAPTIVE)
    transparent.info["transparency"] = 0
    assert save_and_read(tmp_path / "t.png", transparent, 4).shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", "png"), ("1", "png"), ("CMYK", "jpg"), ("LA", "png"), ("RGB", "bmp")]
)
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_common_modes_become_the_wanted_channels(tmp_path: Path, mode: str, ending: str, in_chans: int) -> None:
    grey = 255 if mode == "1" else 200
    pixels = save_and_read(tmp_path / f"x.{ending}", Image.new("RGB", (8, 6), (grey,) * 3).convert(mode), in_chans)
    assert pixels.shape == (in_chans, 6, 8)
    assert torch.allclose(pixels[:3], torch.tensor(grey / 255), atol=0.02)


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1), (np.int16, 1)])
def test_arrays(config: Callable, tmp_path: Path, dtype: type, largest: float) -> None:
    array = np.random.default_rng(0).integers(0, 200, (9, 10, 5)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    pixels = read_image(tmp_path / "a.npy", 5)
    assert torch.allclose(torch.Tensor(pixels), torch.from_numpy(array.astype(np.float32) / largest).permute(2, 0, 1))
    batch = ImageFolder(config(data=tmp_path, in_chans=5), ["a.npy"]).__getitems__([(0, 0), (0, 1)])
    assert batch.images.shape == (2, 5, 64, 64)
    assert batch.images.dtype == torch.float32


def test_grey_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((9, 10), dtype=np.float64))
    assert read_image(tmp_path / "a.npy", 1).shape == (1, 9, 10)


def test_wrong_channels_name_the_file(config: Callable, tmp_path: Path, photos: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 10, 4)))
    with pytest.raises(ChannelError, match=r"a\.npy.*\(9, 10, 4\) has 4 channels.*in_chans is 3"):
        read_image(tmp_path / "a.npy", 3)
    with pytest.raises(ChannelError, match=r"00\.png: in_chans=5 needs \.npy"):
        read_image(photos / "00.png", 5)
    batch = ImageFolder(config(data=tmp_path), ["a.npy"]).__getitems__([(0, 0)])
    assert "a.npy" in batch.error


@pytest.mark.parametrize("content", ["nan", "pickle", "cut", "1d", "empty"])
def test_bad_arrays_are_unreadable_not_wrong(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.npy"
    arrays = {"nan": np.full((4, 4), np.nan), "1d": np.zeros(4), "empty": np.zeros((0, 4))}
    np.save(path, arrays.get(content, np.zeros((4, 4)) if content == "cut" else np.array([{}], dtype=object)))
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises((ValueError, EOFError, OSError)):
        read_image(path, 1)


def damage(folder: Path) -> set[str]:
    """Cut one file, empty one, fill one with noise and delete one."""
    cut = folder / "02.jpg"
    cut.write_bytes(cut.read_bytes()[:700])
    (folder / "04.jpg").write_bytes(b"")
    (folder / "00.png").write_bytes(bytes(range(256)))
    (folder / "sub" / "01.jpg").unlink()
    return {"02.jpg", "04.jpg", "00.png", "sub/01.jpg"}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_reported_and_replaced(config: Callable, own_photos: Path, workers: int) -> None:
    files = list_images(own_photos)
    bad = damage(own_photos)
    settings = config(data=own_photos, workers=workers)
    runs = [list(make_loader(settings, files, 0, 6, pin=False)) for _ in range(2)]
    reported = {path for batch in runs[0] for path, _ in batch.unreadable}
    assert reported == bad
    assert all(reason for batch in runs[0] for _, reason in batch.unreadable)
    for first, second in zip(*runs, strict=True):
        assert not first.error
        assert first.images.shape == (4, 3, 64, 64)
        assert torch.equal(first.images, second.images)


def test_one_good_file_of_many_carries_a_run(config: Callable, own_photos: Path) -> None:
    files = list_images(own_photos)
    for name in files[:-1]:
        (own_photos / name).write_bytes(b"")
    for batch in make_loader(config(data=own_photos), files, 0, 6, pin=False):
        assert not batch.error


def test_nothing_readable_is_an_error(config: Callable, own_photos: Path) -> None:
    files = list_images(own_photos)
    shutil.rmtree(own_photos)
    (batch,) = make_loader(config(data=own_photos), files, 0, 1, pin=False)
    assert "17 images in a row could not be read" in batch.error
    assert str(own_photos) in batch.error


def test_pictures_are_spread_and_skip_bad_files(config: Callable, own_photos: Path) -> None:
    files = list_images(own_photos)
    images, names = load_pictures(config(data=own_photos), files, 4)
    assert images.shape == (4, 3, 64, 64)
    assert names == [files[0], files[3], files[6], files[9]]
    (own_photos / files[0]).write_bytes(b"")
    assert load_pictures(config(data=own_photos), files, 4)[1][0] == files[1]
    assert len(load_pictures(config(data=own_photos), files, 40)[1]) == 11
    shutil.rmtree(own_photos)
    with pytest.raises(ValueError, match="none of the 12 images"):
        load_pictures(config(data=own_photos), files, 4)


def test_picture_keeps_the_shape_of_things(config: Callable, tmp_path: Path) -> None:
    """A centre crop of the right proportions, not a squeezed image."""
    image = Image.new("L", (300, 100))
    image.paste(255, (100, 0, 200, 100))  # the middle square is white
    image.save(tmp_path / "a.png")
    images, _ = load_pictures(config(data=tmp_path, in_chans=1, mean=(0,), std=(1,)), ["a.png"], 1)
    assert images.min() > 0.95
