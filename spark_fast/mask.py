"""Which patches of each image are visible."""

from __future__ import annotations

import torch


def keep_count(grid: tuple[int, int], mask_ratio: float) -> int:
    """Number of visible patches per image: round(gh * gw * (1 - mask_ratio)).

    Raises:
        TypeError: the ratio is not a number.
        ValueError: the ratio is outside [0, 1), or it leaves no patch of this grid visible.
    """
    gh, gw = grid
    if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, int | float):
        raise TypeError(f"mask_ratio must be a number; got {mask_ratio!r}")
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is the masked share of the patches, in [0, 1); got {mask_ratio}")
    if gh < 1 or gw < 1:
        raise ValueError(f"grid is (rows, columns) of patches, each at least 1; got {grid}")
    keep = round(gh * gw * (1 - mask_ratio))
    if keep == 0:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves no visible patch on a grid of {gh}x{gw}: "
            "lower mask_ratio, use larger images or a smaller patch_size"
        )
    return keep


def random_patch_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """A random patch mask per image; every image keeps the same number of patches (paper, section 3.1).

    Args:
        batch: number of images B.
        grid: (gh, gw), patches per column and per row of an image.
        mask_ratio: share of the patches to hide; `round(gh * gw * (1 - mask_ratio))` stay visible.
        generator: source of randomness; the mask is drawn on its device (default: on `device`), then moved.
        device: device of the result.

    Returns:
        bool (B, gh, gw), True = visible ("active").

    Raises:
        ValueError: `batch`, `grid` or `mask_ratio` out of range.
    """
    if batch < 0:
        raise ValueError(f"batch must not be negative; got {batch}")
    keep = keep_count(grid, mask_ratio)
    gh, gw = grid
    draw_on = device if generator is None else generator.device
    given = {} if generator is None else {"generator": generator}  # torch.compile of any batch knows no None here
    noise = torch.rand(batch, gh * gw, device=draw_on, **given)
    kept = noise.argsort(dim=1)[:, :keep]  # (B, K)
    active = torch.zeros(batch, gh * gw, dtype=torch.bool, device=draw_on).scatter_(1, kept, True)
    return active.view(batch, gh, gw).to(device if device is not None else draw_on)
