"""Launcher of csrc/pool_cuda.cu: float32, float16 and bfloat16.

Each function raises TypeError or ValueError, naming the argument, before it runs native code, and RuntimeError naming
the kernel where CUDA fails.
"""

from __future__ import annotations

import torch

from spark_fast.ops import native_cuda
from spark_fast.ops.native_cuda import address, plain, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry


def unsupported(features: torch.Tensor, geometry: Geometry) -> str | None:
    """Why these kernels cannot run this case, or None."""
    if geometry.window.taps > torch.iinfo(torch.int16).max:
        return f"a kernel of {geometry.window.taps} elements; the CUDA kernels number them in 16 bits"
    return native_cuda.dtype_problem(features=features) or native_cuda.geometry_problem(geometry)


def max_forward(features: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (geometry.rows_out, C) from features (geometry.rows_in, C), and the winning tap of each value, int16, -1 for
    a window wholly beyond the border."""
    _check("features", features, geometry.rows_in, geometry)
    device, stream = native_cuda.queue("max_pool_forward", features=features, patches=geometry.source.coords)
    features = plain(features)
    out = features.new_empty(geometry.rows_out, features.shape[1])
    argmax = torch.empty_like(out, dtype=torch.int16)
    native_cuda.module().max_pool_forward(
        device, stream, native_cuda.TYPES[features.dtype], *native_cuda.geometry_args(geometry), features.shape[1],
        address(features), address(out), address(argmax),
    )  # fmt: skip
    return out, argmax


def max_grad_input(grad: torch.Tensor, argmax: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The gradient of the features (geometry.rows_in, C) from the output's, grad (geometry.rows_out, C)."""
    _check("grad", grad, geometry.rows_out, geometry)
    if argmax.shape != grad.shape or argmax.dtype != torch.int16:
        raise ValueError(
            f"max_pool: argmax must be int16 of shape {tuple(grad.shape)}; got {argmax.dtype} {tuple(argmax.shape)}"
        )
    device, stream = native_cuda.queue("max_pool_grad_input", grad=grad, argmax=argmax, patches=geometry.source.coords)
    grad, argmax = plain(grad), plain(argmax)
    out = grad.new_empty(geometry.rows_in, grad.shape[1])
    native_cuda.module().max_pool_grad_input(
        device, stream, native_cuda.TYPES[grad.dtype], *native_cuda.geometry_args(geometry, transposed=True),
        grad.shape[1], address(grad), address(argmax), address(out),
    )  # fmt: skip
    return out


def _check(name: str, rows: torch.Tensor, count: int, geometry: Geometry) -> None:
    if rows.dim() != 2 or rows.shape[0] != count:
        raise ValueError(f"max_pool: {name} must have shape ({count}, channels); got {tuple(rows.shape)}")
    problem = native_cuda.dtype_problem(**{name: rows})
    if problem:
        raise TypeError(f"max_pool: {problem}")
    problem = unsupported(rows, geometry)
    if problem:
        raise ValueError(f"max_pool: {problem}")
