"""Launcher of csrc/densify_cuda.cu: bit copies on the tensor's device, in its current stream."""

from __future__ import annotations

import torch

from spark_fast.ops import checks, native_cuda
from spark_fast.ops.native_cuda import unavailable  # noqa: F401  (asked by ops.backend)
from spark_fast.patches import ActivePatches


def gather(images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """Rows (P * side * side, C) of the active patches of images (B, C, gh * side, gw * side), any strides.

    Raises TypeError or ValueError where an argument does not fit, RuntimeError naming the kernel where CUDA fails.
    """
    if not isinstance(images, torch.Tensor) or images.dtype not in checks.FLOATS:
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"gather_patches: images must be a floating point tensor; got {got}. Cast it with .to(dtype)")
    (gh, gw), shape = patches.grid, tuple(images.shape)
    side = shape[2] // gh if len(shape) == 4 else 0
    if side < 1 or shape[0] != patches.batch or shape[2:] != (gh * side, gw * side):
        raise ValueError(
            f"gather_patches: images must be (batch, channels, height, width) with batch {patches.batch}, cut into "
            f"{gh}x{gw} square patches; got shape {shape}. Resize the images or use another patch_size"
        )
    device, stream = native_cuda.queue("gather_patches", images=images, patches=patches.coords)
    images = images.resolve_neg()
    rows = images.new_empty(patches.rows(side), shape[1])
    b, c, y, x = images.stride()
    native_cuda.module().gather_patches(
        device=device, stream=stream, element_size=images.element_size(), image=images.data_ptr(), strides=(b, c, y, x),
        coords=patches.coords.data_ptr(), patches=patches.count, side=side, channels=shape[1], rows=rows.data_ptr(),
    )  # fmt: skip
    return rows


def scatter(features: torch.Tensor, patches: ActivePatches, side: int, fill: torch.Tensor | None) -> torch.Tensor:
    """Channels-last (B, C, gh * side, gw * side): features (P * side * side, C) where active, else fill (C,) or 0.

    Raises TypeError or ValueError where an argument does not fit, RuntimeError naming the kernel where CUDA fails.
    """
    if not isinstance(side, int) or side < 1:
        raise ValueError(f"scatter_patches: side must be a whole number of pixels, at least 1; got {side!r}")
    checks.check_rows("scatter_patches", features, patches, side)
    channels = features.shape[1]
    checks.check_like("scatter_patches", "fill", fill, features, (channels,))
    device, stream = native_cuda.queue("scatter_patches", features=features, patches=patches.coords, fill=fill)
    features = features.resolve_neg().contiguous()
    fill = None if fill is None else fill.resolve_neg().contiguous()
    gh, gw = patches.grid
    dense = features.new_empty(patches.batch, gh * side, gw * side, channels)
    native_cuda.module().scatter_patches(
        device=device, stream=stream, element_size=features.element_size(), rows=features.data_ptr(),
        fill=0 if fill is None else fill.data_ptr(), grid_to_patch=patches.grid_to_patch.data_ptr(),
        batch=patches.batch, gh=gh, gw=gw, side=side, channels=channels, dense=dense.data_ptr(),
    )  # fmt: skip
    return dense.permute(0, 3, 1, 2)


def sum_masked(maps: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """Sum (C,) over the masked pixels of maps (B, C, gh * side, gw * side)."""
    return gather(maps, patches.complement()).sum(0)
