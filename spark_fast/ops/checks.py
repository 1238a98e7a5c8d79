"""Checks that the ops share, and what autocast asks for."""

from __future__ import annotations

import torch

from spark_fast.patches import ActivePatches

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_patches(op: str, patches: ActivePatches) -> None:
    if not isinstance(patches, ActivePatches):
        raise TypeError(f"{op}: patches must be ActivePatches(active); got {type(patches).__name__}")


def check_rows(op: str, features: torch.Tensor, patches: ActivePatches, side: int) -> None:
    """Raises TypeError or ValueError unless `features` are the rows of `patches` at `side`."""
    check_patches(op, patches)
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"{op}: features must be a tensor; got {type(features).__name__}")
    if features.dim() != 2 or features.shape[0] != patches.rows(side):
        raise ValueError(
            f"{op}: features must be (rows, channels) with {patches.rows(side)} rows, one for each pixel of "
            f"{patches.count} active patches of {side}x{side}; got shape {tuple(features.shape)}"
        )
    if features.dtype not in FLOATS:
        raise TypeError(f"{op}: features must be floating point; got {features.dtype}")
    if features.device != patches.device:
        raise ValueError(f"{op}: features are on {features.device}, patches on {patches.device}; move one with .to()")
    if features.device.type == "meta":
        raise ValueError(f"{op}: features are on meta, which holds no values; put model and images on a real device")


def check_like(op: str, name: str, tensor: torch.Tensor | None, features: torch.Tensor, shape: tuple | None) -> None:
    """Raises unless the optional `tensor` has `shape` and the features' dtype and device."""
    if tensor is None:
        return
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}; got {tuple(tensor.shape)}")
    if tensor.dtype != features.dtype:
        raise TypeError(
            f"{op}: {name} is {tensor.dtype}, the features are {features.dtype}; cast one with .to(dtype), "
            "or run under torch.autocast"
        )
    if tensor.device != features.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, the features are on {features.device}; move one with .to()"
        )


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under torch.autocast, the tensors in its dtype (double is left alone, as autocast does); else unchanged."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
