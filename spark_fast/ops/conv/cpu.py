"""Launcher of csrc/conv_cpu.cpp."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    return _gather(features, weight, bias, geometry, groups, transposed=False)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    return _gather(grad, weight, None, geometry, groups, transposed=True)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    grad, features = computing(grad, features)
    out = grad.new_empty(weight.shape)
    args, keep = native.geometry_args(geometry)
    native.module().conv_grad_weight(
        args, grad.element_size(), features.shape[1], grad.shape[1], groups, address(features), address(grad),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(weight.dtype)


def _gather(source, weight, bias, geometry: Geometry, groups: int, transposed: bool) -> torch.Tensor:
    dtype = source.dtype
    source, weight, bias = computing(source, weight, bias)
    query_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    out = source.new_empty(geometry.rows_in if transposed else geometry.rows_out, query_channels)
    args, keep = native.geometry_args(geometry, transposed)
    native.module().conv_gather(
        args, source.element_size(), source.shape[1], query_channels, groups, address(source), address(weight),
        transposed, address(bias), address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(dtype)
