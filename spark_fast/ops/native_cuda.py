"""Access to the compiled CUDA module: loading it, and the device and stream that a call runs on."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from spark_fast.ops.window import Geometry
from spark_fast.patches import ActivePatches

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # spark::FloatType of csrc/kernels_cuda.h
MOST = 2**31 - 1  # rows, and cells of a grid of patches: the kernels count them in 32 bits


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why `spark_fast._native_cuda` cannot be used, on the current GPU if there is one, or None."""
    try:
        module()
    except ImportError as error:
        return (
            f"the compiled module spark_fast._native_cuda does not load ({error}); it is built where nvcc is found: "
            "install the CUDA toolkit, then reinstall with `SPARK_FAST_CUDA=1 pip install .`"
        )
    if not torch.cuda.is_available():
        return None
    try:
        module().check_device(torch.cuda.current_device())
    except RuntimeError as error:
        return (
            f"the compiled module spark_fast._native_cuda does not run on this GPU with this driver ({error}); it was "
            f"compiled for {module().archs}. Reinstall with SPARK_FAST_CUDA_ARCHS set to the GPU's compute capability "
            "and a CUDA toolkit no newer than the driver"
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


def dtype_problem(**tensors: torch.Tensor | None) -> str | None:
    """Why the kernels do not take the dtypes of these tensors, or None: all must have one, of `TYPES`."""
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    for name, dtype in given.items():
        if dtype not in TYPES:
            return f"{name} is {dtype}; the CUDA kernels take float32, float16 and bfloat16"
    if len(set(given.values())) > 1:
        return " and ".join(f"{name} is {dtype}" for name, dtype in given.items()) + "; the CUDA kernels take one dtype"
    return None


def geometry_problem(geometry: Geometry) -> str | None:
    """Why the kernels cannot count in this geometry, or None."""
    sizes = (
        ("input rows", geometry.rows_in),
        ("output rows", geometry.rows_out),
        ("cells of the grid of input patches", geometry.source.grid_to_patch.numel()),
        ("cells of the grid of output patches", geometry.query.grid_to_patch.numel()),
    )
    for name, size in sizes:
        if size > MOST:
            return f"{size} {name}; the CUDA kernels count up to {MOST}"
    return None


def geometry_args(geometry: Geometry, transposed: bool = False) -> tuple[tuple, tuple, tuple]:
    """The geometry as addresses and sizes: source and query (see PatchMap of csrc/kernels_cuda.h), and the window.
    Forward the query rows are the output's; transposed they are the input's. The caller keeps the geometry alive."""
    window = geometry.window
    maps = map_args(geometry.source, geometry.patch_in), map_args(geometry.query, geometry.patch_out)
    return (*maps[:: -1 if transposed else 1], (*window.kernel, *window.stride, *window.padding, *window.dilation))


def map_args(patches: ActivePatches, size: tuple[int, int]) -> tuple[int, ...]:
    """The rows of `patches` of `size` (height, width) pixels; see PatchMap of csrc/kernels_cuda.h."""
    return address(patches.coords), patches.count, address(patches.grid_to_patch), patches.batch, *patches.grid, *size


def plain(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor contiguous, without a lazy negation."""
    return None if tensor is None else tensor.contiguous().resolve_neg()


def address(tensor: torch.Tensor | None) -> int:
    """Of the tensor's first element; 0 for None.

    Raises:
        TypeError: a tensor subclass, such as a FakeTensor, which has no memory that a kernel could read.
    """
    if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"the CUDA kernels need plain tensors; got {type(tensor).__name__}")
    return 0 if tensor is None else tensor.data_ptr()
