"""Access to the compiled CUDA module: loading it, and the device and stream that a call runs on."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why `spark_fast._native_cuda` cannot be used, or None."""
    try:
        module()
    except ImportError as error:
        return (
            f"the compiled module spark_fast._native_cuda does not load ({error}); it is built where nvcc is found: "
            "install the CUDA toolkit, then reinstall with `SPARK_FAST_CUDA=1 pip install .`"
        )
    return None


def module() -> ModuleType:
    from spark_fast import _native_cuda

    return _native_cuda


def queue(op: str, **tensors: torch.Tensor | None) -> tuple[int, int]:
    """The number of the GPU that all tensors are on, and the handle of its current stream.

    Args:
        op: named in errors.
        tensors: by the names that errors call them; None is left out.

    Raises:
        ValueError: a tensor is not on a GPU, or not on the first one's.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.device.type != "cuda" or tensor.device != device:
            raise ValueError(
                f"{op}: the CUDA backend needs all tensors on one GPU; {name} is on {tensor.device}"
                + (f", the others on {device}" if tensor.device != device else "")
                + ". Move it with .to('cuda')"
            )
    return device.index, torch.cuda.current_stream(device).cuda_stream
