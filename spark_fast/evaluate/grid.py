"""Pictures of reconstructions: original, what the network sees, and what it makes of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from spark_fast.spark import SparK

COLUMNS = ("original", "masked", "reconstructed")
MIN_WIDTH = 96  # smaller images are enlarged by a whole factor, so that the titles fit
GAP = 4
TEXT_HEIGHT = 18
MASK_GREY = 127
BACKGROUND, INK = "white", "black"


def reconstruction_grid(
    model: SparK,
    images: torch.Tensor,
    active: torch.Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str] | None = None,
) -> Image.Image:
    """One row per image: original, masked, reconstructed.

    The network predicts the pattern inside a patch; its mean and contrast are the true ones (see SparK.reconstruct).

    images: normalised float32 (B, C, H, W); active: bool (B, gh, gw), True = seen, None draws a mask; mean, std: C
    values each that the images were normalised with; names: a caption per row. C of 1, 3 and 4 are shown as grey and
    RGB, of any other number the first channel as grey. ValueError if there is no image or the names do not match.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, need (B, C, H, W) with B > 0")
    if names is not None and len(names) != len(images):
        raise ValueError(f"names has {len(names)} entries for {len(images)} images")
    device = next(model.parameters()).device
    active = model.random_mask(len(images)) if active is None else active
    rebuilt = model.reconstruct(images.to(device), active.to(device)).float().cpu()
    height, width = images.shape[2:]
    rows, cols = active.shape[1:]
    seen = active.cpu().repeat_interleave(height // rows, 1).repeat_interleave(width // cols, 2)  # (B, H, W)
    tiles = [
        _row_tiles(original, hidden, made, mean, std)
        for original, hidden, made in zip(images.cpu(), ~seen, rebuilt, strict=True)
    ]
    return _compose(tiles, names)


def save_grid(
    path: Path,
    model: SparK,
    images: torch.Tensor,
    active: torch.Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str] | None = None,
) -> None:
    """Write reconstruction_grid as a PNG."""
    save_png(reconstruction_grid(model, images, active, mean, std, names), Path(path))


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture, encoded first so that no half file is left when encoding fails."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded.getvalue())


def _row_tiles(
    original: torch.Tensor, hidden: torch.Tensor, made: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> list[np.ndarray]:
    """The three columns, uint8 (H, W, 3), H and W enlarged if small. original, made: (C, H, W); hidden: bool (H, W)."""
    scale, offset = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    original, made = original * scale + offset, made * scale + offset
    low, high = original.min(), original.max()
    if low < -0.05 or high > 1.05:  # arrays in units of their own: spread the original's range over the grey scale
        original, made = ((pixels - low) / (high - low) for pixels in (original, made))
    shown = [_to_uint8(original), _to_uint8(original), _to_uint8(made)]
    shown[1][hidden.numpy()] = MASK_GREY
    factor = -(-MIN_WIDTH // hidden.shape[1])
    return [pixels.repeat(factor, 0).repeat(factor, 1) for pixels in shown]


def _to_uint8(pixels: torch.Tensor) -> np.ndarray:
    channels = 3 if len(pixels) in (3, 4) else 1
    shown = (pixels[:channels].clamp(0, 1) * 255).round().to(torch.uint8)
    return shown.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def _compose(tiles: list[list[np.ndarray]], names: Sequence[str] | None) -> Image.Image:
    height, width = tiles[0][0].shape[:2]
    row_height = height + GAP + (TEXT_HEIGHT if names else 0)
    canvas = Image.new("RGB", (3 * width + 4 * GAP, TEXT_HEIGHT + GAP + len(tiles) * row_height), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for column, title in enumerate(COLUMNS):
        draw.text((GAP + column * (width + GAP), 2), title, fill=INK, font=font)
    for row, images in enumerate(tiles):
        top = TEXT_HEIGHT + row * row_height
        if names:
            draw.text((GAP, top + 2), names[row], fill=INK, font=font)
            top += TEXT_HEIGHT
        for column, pixels in enumerate(images):
            canvas.paste(Image.fromarray(pixels), (GAP + column * (width + GAP), top))
    return canvas
