"""Launcher of csrc/pool_cpu.cpp."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry


def max_forward(features, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    (source,) = computing(features)
    out = source.new_empty(geometry.rows_out, source.shape[1])
    argmax = torch.empty(out.shape, dtype=torch.int16)
    args, keep = native.geometry_args(geometry)
    native.module().max_pool_forward(
        args, source.element_size(), source.shape[1], address(source), address(out), address(argmax),
        torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(features.dtype), argmax


def max_grad_input(grad, argmax, geometry: Geometry) -> torch.Tensor:
    (source,) = computing(grad)
    out = source.new_empty(geometry.rows_in, source.shape[1])
    args, keep = native.geometry_args(geometry, transposed=True)
    native.module().max_pool_grad_input(
        args, source.element_size(), source.shape[1], address(source), address(argmax), address(out),
        torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(grad.dtype)
