"""Launcher of csrc/conv_cpu.cpp; 1x1 convolutions are one library GEMM."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    if geometry.is_pointwise and groups == 1:
        matrix = weight.flatten(1).t()
        return features @ matrix if bias is None else torch.addmm(bias, features, matrix)
    out = _gather_gemm(features, weight, bias, geometry, groups, transposed=False)
    return out.to(features.dtype)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    if geometry.is_pointwise and groups == 1:
        return grad @ weight.flatten(1)
    return _gather_gemm(grad, weight, None, geometry, groups, transposed=True).to(grad.dtype)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    if geometry.is_pointwise and groups == 1:
        return (grad.t() @ features).view_as(weight)
    grad, features = computing(grad, features)
    run, threads = native.module(), torch.get_num_threads()
    channels, out_channels, taps = features.shape[1], grad.shape[1], geometry.window.taps
    packed = _packed(run, channels, out_channels, groups, taps, grad)
    args, keep = native.geometry_args(geometry)
    size, shape = grad.element_size(), (channels, out_channels, groups)
    run.conv_grad_weight(args, size, *shape, address(features), address(grad), address(packed), threads)
    out = grad.new_empty(weight.shape)
    run.unpack_weight(size, *shape, taps, address(packed), address(out), threads)
    del keep
    return out.to(weight.dtype)


def _gather_gemm(source, weight, bias, geometry: Geometry, groups: int, transposed: bool) -> torch.Tensor:
    source, weight, bias = computing(source, weight, bias)
    run, threads = native.module(), torch.get_num_threads()
    source_channels, taps = source.shape[1], geometry.window.taps
    query_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    packed = _packed(run, source_channels, query_channels, groups, taps, source)
    size, shape = source.element_size(), (source_channels, query_channels, groups)
    run.pack_weight(size, *shape, taps, transposed, address(weight), address(packed), threads)
    out = source.new_empty(geometry.rows_in if transposed else geometry.rows_out, query_channels)
    args, keep = native.geometry_args(geometry, transposed)
    run.conv_gather_gemm(
        args, size, *shape, address(source), address(packed), address(bias), address(out), threads
    )  # fmt: skip
    del keep
    return out


def _packed(run, source_channels: int, query_channels: int, groups: int, taps: int, like) -> torch.Tensor:
    """Room for the weight as (groups, panels, taps, source channels / groups, panel columns)."""
    columns = run.panel_columns(like.element_size())
    panels = -(-(query_channels // groups) // columns)
    return like.new_empty(groups, panels, taps, source_channels // groups, columns)
