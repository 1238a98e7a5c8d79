"""Launcher of csrc/depthwise_cpu.cpp. The kernels take weights as (taps, channels)."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry) -> torch.Tensor:
    return _gather(features, weight, bias, geometry, transposed=False)


def grad_input(grad, weight, geometry: Geometry) -> torch.Tensor:
    return _gather(grad, weight, None, geometry, transposed=True)


def grad_weight(grad, features, geometry: Geometry, weight) -> torch.Tensor:
    source, query = computing(features, grad)
    out = source.new_empty(geometry.window.taps, source.shape[1])
    args, keep = native.geometry_args(geometry)
    native.module().depthwise_grad_weight(
        args, _columns(geometry, False), source.element_size(), source.shape[1], address(source), address(query),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.t().reshape(weight.shape).to(weight.dtype)


def _gather(source, weight, bias, geometry: Geometry, transposed: bool) -> torch.Tensor:
    dtype, channels = source.dtype, source.shape[1]
    source, weight, bias = computing(source, weight.reshape(channels, -1).t(), bias)
    out = source.new_empty(geometry.rows_in if transposed else geometry.rows_out, channels)
    args, keep = native.geometry_args(geometry, transposed)
    native.module().depthwise_gather(
        args, _columns(geometry, transposed), source.element_size(), channels, address(source), address(weight),
        address(bias), address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(dtype)


def _columns(geometry: Geometry, transposed: bool) -> tuple[int, int, int, bool]:
    """How the window moves along x."""
    window = geometry.window
    return window.stride[1], window.padding[1], window.dilation[1], transposed
