"""A folder of unlabelled images as an endless, reproducible stream of batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Image as ImageTensor

from spark_fast.train.config import PretrainConfig
from spark_fast.train.seeds import ORDER, SAMPLE, SUBSTITUTE, cpu_seed, derive_seed, generator

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".npy"),
)
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAX_UINT16 = 65535

DecodedImage = Image.Image | ImageTensor


class ChannelError(ValueError):
    """An image has another number of channels than the network's in_chans."""


class Batch(NamedTuple):
    """Images of one optimiser step, float32 (B, C, H, W), and the (path, reason) of files that could not be read."""

    images: torch.Tensor
    unreadable: list[tuple[str, str]]
    error: str  # not empty: the run cannot go on


def list_images(folder: Path) -> list[str]:
    """Paths of all images under a folder, relative to it, sorted; hidden files and folders are left out.

    Raises ValueError if the folder does not exist, is no folder or holds no image.
    """
    if not folder.exists():
        raise ValueError(f"data={folder} does not exist; give a folder of images")
    if not folder.is_dir():
        raise ValueError(f"data={folder} is not a folder; give the folder that holds the images")
    found, others, visited = [], 0, set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS):
                found.append((Path(root) / name).relative_to(folder).as_posix())
            else:
                others += 1
    if not found:
        raise ValueError(
            f"data={folder} holds no image ({others} other files). Looked in it and its subfolders for "
            + " ".join(EXTENSIONS)
        )
    return sorted(found)


def read_image(path: Path, in_chans: int) -> DecodedImage:
    """Decode a file to a PIL image with in_chans channels or, for more than 8 bits, a float32 tensor (C, H, W).

    uint8 and uint16 values are scaled to 0..1 by their type's largest value; other numbers are taken as they are.
    Raises ChannelError if the file has another number of channels, any other exception if it cannot be decoded.
    """
    if path.suffix.lower() == ".npy":
        return _read_array(path, in_chans)
    if in_chans not in _PIL_MODES:
        raise ChannelError(f"{path}: in_chans={in_chans} needs .npy arrays; image files serve 1, 3 and 4 channels")
    with Image.open(path) as image:
        image.load()
        if image.mode == "F" or image.mode.startswith("I"):
            return _deep_grey(np.asarray(image), in_chans)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert(_PIL_MODES[in_chans])


def _deep_grey(pixels: np.ndarray, in_chans: int) -> ImageTensor:
    """16-bit, 32-bit or float grey (H, W) as float32 (C, H, W). PIL's own conversion would cut all above 255."""
    if pixels.dtype.kind in "iu":
        if pixels.min() < 0 or pixels.max() > _MAX_UINT16:
            raise ValueError("32-bit grey values outside 0..65535 have no known scale; store them as a float .npy")
        pixels = pixels.astype(np.float32) / _MAX_UINT16
    grey = _finite_tensor(pixels).expand(min(in_chans, 3), -1, -1)
    if in_chans == 4:
        grey = torch.cat([grey, torch.ones_like(grey[:1])])
    return ImageTensor(grey)


def _read_array(path: Path, in_chans: int) -> ImageTensor:
    array = np.load(path, allow_pickle=False)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"an array of shape {array.shape}, need (H, W) or (H, W, C)")
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels != in_chans:
        raise ChannelError(
            f"{path}: an array of shape {array.shape} has {channels} channels (last axis), in_chans is {in_chans}"
        )
    if array.dtype in (np.uint8, np.uint16):
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    return ImageTensor(_finite_tensor(array.reshape(*array.shape[:2], channels).transpose(2, 0, 1)))


def _finite_tensor(array: np.ndarray) -> torch.Tensor:
    """float32 (C, H, W); (H, W) gains a channel axis."""
    values = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not values.isfinite().all():
        raise ValueError("NaN or infinite values")
    return values if values.ndim == 3 else values[None]


def train_transform(config: PretrainConfig) -> v2.Transform:
    """Random crop, flip and normalisation of a decoded image to float32 (C, H, W)."""
    crop = v2.RandomResizedCrop(
        config.size, scale=config.scale, interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(config.hflip), *_to_normalized(config)])


def picture_transform(config: PretrainConfig) -> v2.Transform:
    """The largest centre crop of the wanted shape, resized and normalised to float32 (C, H, W)."""
    height, width = config.size

    def crop(image: DecodedImage) -> DecodedImage:
        have_height, have_width = v2.functional.get_size(image)
        scale = min(have_height / height, have_width / width)
        return v2.functional.center_crop(image, [max(1, round(height * scale)), max(1, round(width * scale))])

    resize = v2.Resize(config.size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, resize, *_to_normalized(config)])


def _to_normalized(config: PretrainConfig) -> list[v2.Transform]:
    mean, std = config.normalization
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]


class ImageFolder(Dataset):
    """Batches of images; an image is a pure function of (seed, epoch, index) and the file it comes from."""

    def __init__(self, config: PretrainConfig, files: Sequence[str]) -> None:
        self.root, self.files = config.data, files
        self.seed, self.in_chans, self.batch_size = config.seed, config.in_chans, config.batch_size
        self.transform = train_transform(config)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, samples: list[tuple[int, int]]) -> Batch:
        """Samples of (epoch, index) as one batch; unreadable files are replaced by others of the folder."""
        images, unreadable = [], []
        for epoch, index in samples:
            start = derive_seed(self.seed, SUBSTITUTE, epoch, index)
            for attempt in range(max(self.batch_size, 16) + 1):
                file = (start + attempt if attempt else index) % len(self.files)
                try:
                    images.append(self._load(file, epoch, index))
                    break
                except ChannelError as error:
                    return Batch(torch.empty(0), unreadable, str(error))
                except Exception as error:  # decoders raise whatever they like on broken data
                    unreadable.append((self.files[file], f"{type(error).__name__}: {error}"))
            else:
                return Batch(torch.empty(0), unreadable, self._all_failed(attempt + 1, *unreadable[-1]))
        return Batch(torch.stack(images), unreadable, "")

    def _load(self, file: int, epoch: int, index: int) -> torch.Tensor:
        image = read_image(self.root / self.files[file], self.in_chans)
        with cpu_seed(derive_seed(self.seed, SAMPLE, epoch, index)):
            return self.transform(image)

    def _all_failed(self, count: int, path: str, reason: str) -> str:
        return (
            f"{count} images in a row could not be read; the last was {self.root / path} ({reason}). "
            f"Is data={self.root} still there, and are its files whole?"
        )


class StepSampler(Sampler):
    """For steps start..stop-1 the (epoch, index) of each sample: a fresh permutation per epoch, the rest dropped."""

    def __init__(self, config: PretrainConfig, file_count: int, start: int, stop: int) -> None:
        self.samples = file_count * config.epoch_repeats
        self.seed, self.batch_size = config.seed, config.batch_size
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch, order_of = self.samples // self.batch_size, -1
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_of:
                order = torch.randperm(self.samples, generator=generator(self.seed, ORDER, epoch))
                order_of = epoch
            first = position * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


def steps_per_epoch(config: PretrainConfig, file_count: int) -> int:
    """Whole batches in an epoch; ValueError if there is not even one."""
    samples = file_count * config.epoch_repeats
    if samples < config.batch_size:
        repeats = -(-config.batch_size // file_count)
        raise ValueError(
            f"data={config.data} holds {file_count} images, {samples} per epoch with epoch_repeats="
            f"{config.epoch_repeats}: fewer than batch_size={config.batch_size}. Set epoch_repeats to {repeats} or "
            f"more, or batch_size to {samples} or less"
        )
    return samples // config.batch_size


def make_loader(config: PretrainConfig, files: Sequence[str], start: int, stop: int, pin: bool) -> DataLoader:
    """A loader of the batches of steps start..stop-1, through all epochs in one go."""
    return DataLoader(
        ImageFolder(config, files),
        batch_sampler=StepSampler(config, len(files), start, stop),
        num_workers=config.worker_count,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=pin,
    )


def load_pictures(config: PretrainConfig, files: Sequence[str], count: int) -> tuple[torch.Tensor, list[str]]:
    """Up to count images spread evenly over the files, centre-cropped: float32 (n, C, H, W), and their names.

    A file that cannot be read gives way to the next one. ValueError if none can be read.
    """
    transform, images, names, reason, taken = picture_transform(config), [], [], "", set()
    for wanted in range(min(count, len(files))):
        first = wanted * len(files) // min(count, len(files))
        for file in (*range(first, len(files)), *range(first)):
            if file in taken:
                continue
            taken.add(file)
            try:
                images.append(transform(read_image(config.data / files[file], config.in_chans)))
                names.append(files[file])
                break
            except ChannelError:
                raise
            except Exception as error:
                reason = f"{files[file]}: {error}"
    if not images:
        raise ValueError(f"none of the {len(files)} images under {config.data} can be read; the last: {reason}")
    return torch.stack(images), names


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group: only the training process shall act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
