"""Launcher of csrc/conv_cuda.cu: 3x3 convolution of stride 1 in float16 and bfloat16, sums in float32.

Each function raises TypeError or ValueError, naming the argument, before it runs native code, and RuntimeError naming
the kernel where CUDA fails.
"""

from __future__ import annotations

import torch

from spark_fast.ops import native_cuda
from spark_fast.ops.native_cuda import address, plain, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry, Window

WINDOW = Window((3, 3), (1, 1), (1, 1))
SIDES = (2, 4, 8, 16)
DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 8  # of channels: 16 bytes, which the kernels copy together
ALIGNMENT = 16  # of addresses, in bytes
LEAST_CAPABILITY = (8, 0)  # asynchronous copies, products of bfloat16


def unsupported(features: torch.Tensor, weight: torch.Tensor, geometry: Geometry, groups: int) -> str | None:
    """Why these kernels do not run this case, or None. `features` are the input's rows or the output's gradient."""
    if features.dtype not in DTYPES or weight.dtype != features.dtype:
        return f"they take rows and weight both in bfloat16 or both in float16; got {features.dtype} and {weight.dtype}"
    if groups != 1 or geometry.window != WINDOW:
        return f"they take 3x3, stride 1, padding 1, dilation 1 in one group; got {geometry.window}, {groups} groups"
    if geometry.source is not geometry.query:
        return "they take the same patches before and after; got sparse rows to a dense map"
    if geometry.patch_in not in [(side, side) for side in SIDES]:
        sides = ", ".join(map(str, SIDES))
        return f"they take square patches of side {sides}; got {geometry.patch_in[0]}x{geometry.patch_in[1]} pixels"
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE or not weight.numel():
        return f"they take multiples of {MULTIPLE} channels; got {weight.shape[1]} to {weight.shape[0]}"
    if features.device.type == "cuda" and torch.cuda.get_device_capability(features.device) < LEAST_CAPABILITY:
        return "they take GPUs of compute capability 8.0 and later"
    return native_cuda.geometry_problem(geometry)


def yields(features: torch.Tensor, weight: torch.Tensor, geometry: Geometry, groups: int) -> bool:
    """Is Triton expected to be faster? At side 2 it skips taps that these kernels multiply, a third of all."""
    return geometry.patch_in == (2, 2)


def forward(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, groups: int
) -> torch.Tensor:
    """Rows (N, O) from features (N, C), weight (O, C, 3, 3) and bias (O,) or None."""
    _check("features", features, weight.shape[1], weight, geometry, groups)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv: bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    if bias is not None and bias.dtype != features.dtype:
        raise TypeError(f"conv: bias is {bias.dtype}, features are {features.dtype}; cast one with .to(dtype)")
    return _gather("features", features, weight, bias, geometry, transposed=False)


def grad_input(grad: torch.Tensor, weight: torch.Tensor, geometry: Geometry, groups: int) -> torch.Tensor:
    """The gradient of the features (N, C) from the output's, grad (N, O)."""
    _check("grad", grad, weight.shape[0], weight, geometry, groups)
    return _gather("grad", grad, weight, None, geometry, transposed=True)


def grad_weight(
    grad: torch.Tensor, features: torch.Tensor, geometry: Geometry, groups: int, weight: torch.Tensor
) -> torch.Tensor:
    """The gradient of the weight (O, C, 3, 3), in its dtype: the same bits in every run on one kind of GPU."""
    _check("grad", grad, weight.shape[0], weight, geometry, groups)
    _check("features", features, weight.shape[1], weight, geometry, groups)
    device, stream = native_cuda.queue(
        "conv", grad=grad, features=features, weight=weight, patches=geometry.source.coords
    )
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if not geometry.rows_in:
        return out.zero_()
    grad, features = _aligned(grad), _aligned(features)
    columns, channels = weight.shape[:2]
    map_args = native_cuda.geometry_args(geometry)[0]
    parts = native_cuda.module().conv_weight_parts(device, map_args, channels, columns)
    partial = features.new_empty(parts, 9, channels, columns, dtype=torch.float32)
    native_cuda.module().conv_weight(
        device, stream, native_cuda.TYPES[features.dtype], map_args, channels, columns, address(features),
        address(grad), address(partial), parts, address(out),
    )  # fmt: skip
    return out


def _gather(name: str, source, weight, bias, geometry: Geometry, transposed: bool) -> torch.Tensor:
    device, stream = native_cuda.queue(
        "conv", **{name: source}, weight=weight, bias=bias, patches=geometry.source.coords
    )
    channels, columns = weight.shape[:2] if transposed else weight.shape[1::-1]
    source, bias = _aligned(source), plain(bias)
    weight = _aligned(weight.permute(2, 3, 0, 1) if transposed else weight.permute(2, 3, 1, 0))  # (3, 3, in, out)
    out = source.new_empty(source.shape[0], columns)
    native_cuda.module().conv_gather(
        device, stream, native_cuda.TYPES[source.dtype], native_cuda.geometry_args(geometry)[0], channels, columns,
        transposed, address(source), address(weight), address(bias), address(out),
    )  # fmt: skip
    return out


def _check(name: str, rows: torch.Tensor, channels: int, weight: torch.Tensor, geometry: Geometry, groups: int) -> None:
    problem = unsupported(rows, weight, geometry, groups)
    if problem:
        raise ValueError(f"conv: the CUDA kernels do not run this: {problem}")
    if weight.shape[2:] != WINDOW.kernel:
        raise ValueError(f"conv: weight must have shape (O, C, 3, 3); got {tuple(weight.shape)}")
    if rows.shape != (geometry.rows_in, channels):
        raise ValueError(f"conv: {name} must have shape ({geometry.rows_in}, {channels}); got {tuple(rows.shape)}")


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor contiguous, without a lazy negation, at an address that the kernels can copy from."""
    tensor = plain(tensor)
    return tensor if address(tensor) % ALIGNMENT == 0 else tensor.clone()
