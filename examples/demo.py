"""Pre-train a small ResNet on four photographs, in about three minutes on two CPU cores, and look at what it learned.

Run it with `make demo`. The photographs come with scikit-image; nothing is downloaded. Four photographs are far too few
to learn anything useful: the point is to see every part at work.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path

import timm
import torch
import tyro
from PIL import Image
from skimage import data

from spark_fast import SparK
from spark_fast.evaluate import save_grid
from spark_fast.evaluate.speed import compare_with_dense
from spark_fast.train import PretrainConfig, RunInterrupted, pretrain
from spark_fast.train.checkpoint import model_from_checkpoint
from spark_fast.train.data import load_pictures
from spark_fast.train.seeds import PICTURE, generator

MODEL, SIZE, BATCH = "resnet18", 192, 8
TRAINED_ON = ("astronaut", "motorcycle", "retina", "rocket")
HELD_OUT = ("cat", "coffee")


def main(out: Path = Path("runs/demo"), epochs: int = 25) -> int:
    """Pre-train, draw, measure.

    Args:
        out: folder for all results. It is emptied first if an earlier demo filled it.
        epochs: length of the training; 25 take about three minutes.
    """
    if (out / "photos").exists():
        shutil.rmtree(out)
    save_photos(out / "photos" / "train", TRAINED_ON)
    save_photos(out / "photos" / "held_out", HELD_OUT)
    config = PretrainConfig(
        data=out / "photos" / "train",
        out=out / "run",
        model=MODEL,
        img_size=SIZE,
        batch_size=BATCH,
        epochs=epochs,
        epoch_repeats=32,
        scale=(0.3, 1.0),
        mask_ratio=0.6,
        decoder_width=128,
        opt="adamw",
        lr=3e-3,
        betas=(0.9, 0.95),
        workers=0,
        log_every=20,
    )
    try:
        result = pretrain(config)
    except RunInterrupted as stopped:
        print(stopped)
        return 130
    model, _ = model_from_checkpoint(result.checkpoint)
    draw(model, config, out)
    print(f"reconstructions      {out / 'reconstructions.png'}  (each filled patch keeps its true mean and contrast)")
    print(f"loss curve           {result.loss_curve}  (from about 1.0 to {result.final_loss:.3f})")
    print(f"backbone for timm    {result.backbone}")
    timm.create_model(MODEL, num_classes=0, checkpoint_path=str(result.backbone))
    print(f"                     timm.create_model({MODEL!r}, num_classes=0, checkpoint_path={str(result.backbone)!r})")
    measure(model)
    return 0


def save_photos(folder: Path, names: tuple[str, ...]) -> None:
    """Write photographs that scikit-image brings along as PNG files of at most 224 pixels on the short side."""
    folder.mkdir(parents=True)
    sources = {"cat": data.chelsea, "motorcycle": lambda: data.stereo_motorcycle()[0]}
    for name in names:
        photo = Image.fromarray(sources.get(name, getattr(data, name, None))())
        scale = min(1.0, 224 / min(photo.size))
        photo.resize((round(photo.width * scale), round(photo.height * scale))).save(folder / f"{name}.png")


def draw(model: SparK, config: PretrainConfig, out: Path) -> None:
    """Draw photographs trained on and held out, and say which is which."""
    files = [f"train/{name}.png" for name in TRAINED_ON] + [f"held_out/{name}.png" for name in HELD_OUT]
    images, found = load_pictures(PretrainConfig(data=out / "photos", out=out, img_size=SIZE), files, len(files))
    labels = [f"{Path(name).stem} ({'held out' if 'held_out' in name else 'trained on'})" for name in found]
    active = model.random_mask(len(images), generator=generator(config.seed, PICTURE))
    save_grid(out / "reconstructions.png", model, images, active, *config.normalization, names=labels)


def measure(model: SparK) -> None:
    """Time the sparse encoder against the same network run dense with masks, and print the ratio as it is."""
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    speed = compare_with_dense(model.encoder, images, model.random_mask(BATCH), rounds=9)
    sparse, dense = (1000 * statistics.median(times) for times in (speed.sparse, speed.dense))
    print(
        f"encoder forward and backward, {BATCH} images of {SIZE}x{SIZE}, {torch.get_num_threads()} threads: sparse "
        f"{sparse:.0f} ms, dense with masks in channels_last {dense:.0f} ms; sparse is {speed.ratio:.2f}x as fast"
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
