"""Launcher of csrc/densify_cuda.cu: bit copies on the tensor's device, in its current stream."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from spark_fast.ops import checks
from spark_fast.patches import ActivePatches


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why `spark_fast._native_cuda` cannot be used, or None."""
    try:
        _module()
    except ImportError as error:
        return (
            f"the compiled module spark_fast._native_cuda does not load ({error}); it is built where nvcc is found: "
            "install the CUDA toolkit, then reinstall with `SPARK_FAST_CUDA=1 pip install .`"
        )
    return None


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
    device, stream = _queue("gather_patches", "images", images, patches)
    images = images.resolve_neg()
    rows = images.new_empty(patches.rows(side), shape[1])
    b, c, y, x = images.stride()
    _module().gather_patches(
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
    device, stream = _queue("scatter_patches", "features", features, patches)
    features = features.resolve_neg().contiguous()
    fill = None if fill is None else fill.resolve_neg().contiguous()
    gh, gw = patches.grid
    dense = features.new_empty(patches.batch, gh * side, gw * side, channels)
    _module().scatter_patches(
        device=device, stream=stream, element_size=features.element_size(), rows=features.data_ptr(),
        fill=0 if fill is None else fill.data_ptr(), grid_to_patch=patches.grid_to_patch.data_ptr(),
        batch=patches.batch, gh=gh, gw=gw, side=side, channels=channels, dense=dense.data_ptr(),
    )  # fmt: skip
    return dense.permute(0, 3, 1, 2)


def _module() -> ModuleType:
    from spark_fast import _native_cuda

    return _native_cuda


def _queue(op: str, name: str, tensor: torch.Tensor, patches: ActivePatches) -> tuple[int, int]:
    """The number of the tensor's GPU and the handle of its current stream; ValueError unless both live on one GPU."""
    if tensor.device.type != "cuda" or tensor.device != patches.device:
        raise ValueError(
            f"{op}: the CUDA backend needs {name} and patches on one GPU; {name} are on {tensor.device}, patches on "
            f"{patches.device}. Move them with .to('cuda')"
        )
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
