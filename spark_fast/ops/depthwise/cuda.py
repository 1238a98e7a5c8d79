"""Launcher of csrc/depthwise_cuda.cu and csrc/depthwise_weight_cuda.cu: float32, float16 and bfloat16, sums in float32.

Each function raises TypeError or ValueError, naming the argument, before it runs native code, and RuntimeError naming
the kernel where CUDA fails.
"""

from __future__ import annotations

import torch

from spark_fast.ops import native_cuda
from spark_fast.ops.native_cuda import address, plain, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry


def unsupported(features: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> str | None:
    """Why these kernels cannot run this case, or None."""
    return native_cuda.dtype_problem(features=features, weight=weight) or native_cuda.geometry_problem(geometry)


def forward(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """Rows (geometry.rows_out, C) from features (geometry.rows_in, C), weight (C, 1, kh, kw), bias (C,) or None."""
    _check("features", features, geometry.rows_in, weight, geometry)
    if bias is not None and bias.shape != features.shape[1:]:
        raise ValueError(f"depthwise: bias must have shape ({features.shape[1]},); got {tuple(bias.shape)}")
    if bias is not None and bias.dtype != features.dtype:
        raise TypeError(f"depthwise: bias is {bias.dtype}, features are {features.dtype}; cast one with .to(dtype)")
    return _gather("features", features, weight, bias, geometry, transposed=False)


def grad_input(grad: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The gradient of the features (geometry.rows_in, C) from the output's, grad (geometry.rows_out, C)."""
    _check("grad", grad, geometry.rows_out, weight, geometry)
    return _gather("grad", grad, weight, None, geometry, transposed=True)


def grad_weight(grad: torch.Tensor, features: torch.Tensor, geometry: Geometry, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of the weight (C, 1, kh, kw), in its dtype: the same bits in every run."""
    _check("grad", grad, geometry.rows_out, weight, geometry)
    _check("features", features, geometry.rows_in, weight, geometry)
    device, stream = native_cuda.queue(
        "depthwise_grad_weight", grad=grad, features=features, weight=weight, patches=geometry.source.coords
    )
    grad, features = plain(grad), plain(features)
    channels, kind = features.shape[1], native_cuda.TYPES[features.dtype]
    maps = native_cuda.geometry_args(geometry)
    parts = native_cuda.module().depthwise_parts(kind, *maps, channels)
    sums = features.new_empty(parts, geometry.window.taps, channels, dtype=torch.float32)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    native_cuda.module().depthwise_grad_weight(
        device, stream, kind, *maps, channels, address(features), address(grad), address(sums), parts, address(out)
    )
    return out


def _gather(name, source, weight, bias, geometry: Geometry, transposed: bool) -> torch.Tensor:
    device, stream = native_cuda.queue(
        "depthwise", **{name: source}, weight=weight, bias=bias, patches=geometry.source.coords
    )
    source, weight, bias = plain(source), plain(weight), plain(bias)
    out = source.new_empty(geometry.rows_in if transposed else geometry.rows_out, source.shape[1])
    native_cuda.module().depthwise_gather(
        device, stream, native_cuda.TYPES[source.dtype], *native_cuda.geometry_args(geometry, transposed), transposed,
        source.shape[1], address(source), address(weight), address(bias), address(out),
    )  # fmt: skip
    return out


def _check(name: str, rows: torch.Tensor, count: int, weight: torch.Tensor, geometry: Geometry) -> None:
    if rows.dim() != 2 or rows.shape[0] != count:
        raise ValueError(f"depthwise: {name} must have shape ({count}, channels); got {tuple(rows.shape)}")
    shape = (rows.shape[1], 1, *geometry.window.kernel)
    if tuple(weight.shape) != shape:
        raise ValueError(f"depthwise: weight must have shape {shape}; got {tuple(weight.shape)}")
    problem = native_cuda.dtype_problem(**{name: rows}, weight=weight)
    if problem:
        raise TypeError(f"depthwise: {problem}")
    problem = native_cuda.geometry_problem(geometry)
    if problem:
        raise ValueError(f"depthwise: {problem}")
