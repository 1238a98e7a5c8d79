"""Launcher of csrc/conv_cpu.cpp and, for the kernels that it knows, of csrc/winograd_cpu.cpp."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.window import Geometry, Window

WINOGRAD = Window((3, 3), (1, 1), (1, 1))
LEAST_CHANNELS = 16  # below, transforming tiles costs more than it saves


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    return _gather(features, weight, bias, geometry, groups, transposed=False)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    return _gather(grad, weight, None, geometry, groups, transposed=True)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    if _is_winograd(geometry, groups, features.shape[1], grad.shape[1]):
        return _winograd_grad_weight(grad, features, geometry, weight, 1)
    grad, features = computing(grad, features)
    out = grad.new_empty(weight.shape)
    args, keep = native.geometry_args(geometry)
    native.module().conv_grad_weight(
        args, grad.element_size(), features.shape[1], grad.shape[1], groups, address(features), address(grad),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(weight.dtype)


def cell_forward(features, weight, bias, geometry: Geometry) -> torch.Tensor:
    """3x3 convolution with the four pixels of a 2x2 cell for each output pixel: weight (4 O, C, 3, 3), result (4 N, O),
    rows of the map of twice the height and width. The map's sides are even, O is a multiple of 16."""
    return _winograd(features, weight, bias, geometry, transposed=False, cells=(1, 2))


def cell_grad_input(grad, weight, geometry: Geometry) -> torch.Tensor:
    return _winograd(grad, weight, None, geometry, transposed=True, cells=(2, 1))


def cell_grad_weight(grad, features, geometry: Geometry, weight) -> torch.Tensor:
    return _winograd_grad_weight(grad, features, geometry, weight, 2)


def _is_winograd(geometry: Geometry, groups: int, source_channels: int, query_channels: int) -> bool:
    sides = (*geometry.patch_in, *geometry.patch_out)  # tiles are of 2x2 pixels
    enough = min(source_channels, query_channels) >= LEAST_CHANNELS
    return geometry.window == WINOGRAD and groups == 1 and enough and not any(side % 2 for side in sides)


def _gather(source, weight, bias, geometry: Geometry, groups: int, transposed: bool) -> torch.Tensor:
    query_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if _is_winograd(geometry, groups, source.shape[1], query_channels):
        return _winograd(source, weight, bias, geometry, transposed)
    dtype = source.dtype
    source, weight, bias = computing(source, weight, bias)
    out = source.new_empty(geometry.rows_in if transposed else geometry.rows_out, query_channels)
    args, keep = native.geometry_args(geometry, transposed)
    native.module().conv_gather(
        args, source.element_size(), source.shape[1], query_channels, groups, address(source), address(weight),
        transposed, address(bias), address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(dtype)


def _winograd(source, weight, bias, geometry: Geometry, transposed: bool, cells=(1, 1)) -> torch.Tensor:
    if transposed:
        geometry = geometry.reversed  # the same window, with the kernel turned
    dtype = source.dtype
    source, weight, bias = computing(source, weight, bias)
    area = cells[1] ** 2
    out = source.new_empty(geometry.rows_out * area, weight.shape[1 if transposed else 0] // area)
    args, keep = native.geometry_args(geometry)
    native.module().winograd_forward(
        args, source.element_size(), source.shape[1], out.shape[1], *cells, address(source), address(weight),
        transposed, address(bias), address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(dtype)


def _winograd_grad_weight(grad, features, geometry: Geometry, weight, cell: int) -> torch.Tensor:
    grad, features = computing(grad, features)
    out = grad.new_empty(weight.shape)
    args, keep = native.geometry_args(geometry)
    native.module().winograd_grad_weight(
        args, grad.element_size(), features.shape[1], grad.shape[1], 1, cell, address(features), address(grad),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    del keep
    return out.to(weight.dtype)
