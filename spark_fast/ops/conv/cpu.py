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
    grad, features = computing(grad, features)
    out = grad.new_empty(weight.shape)
    args, keep = native.geometry_args(geometry)
    shape = (grad.element_size(), features.shape[1], grad.shape[1])
    addresses, threads = (address(features), address(grad), address(out)), torch.get_num_threads()
    if _is_winograd(geometry, groups, *shape[1:]):
        native.module().winograd_grad_weight(args, *shape, *addresses, threads)
    else:
        native.module().conv_grad_weight(args, *shape, groups, *addresses, threads)
    del keep
    return out.to(weight.dtype)


def _is_winograd(geometry: Geometry, groups: int, source_channels: int, query_channels: int) -> bool:
    sides = (*geometry.patch_in, *geometry.patch_out)  # tiles are of 2x2 pixels
    enough = min(source_channels, query_channels) >= LEAST_CHANNELS
    return geometry.window == WINOGRAD and groups == 1 and enough and not any(side % 2 for side in sides)


def _gather(source, weight, bias, geometry: Geometry, groups: int, transposed: bool) -> torch.Tensor:
    dtype = source.dtype
    source, weight, bias = computing(source, weight, bias)
    query_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    out = source.new_empty(geometry.rows_in if transposed else geometry.rows_out, query_channels)
    shape = (source.element_size(), source.shape[1], query_channels)
    addresses = (address(source), address(weight), transposed, address(bias), address(out))
    threads = torch.get_num_threads()
    if _is_winograd(geometry, groups, *shape[1:]):  # transposed: the same window with the kernel turned
        args, keep = native.geometry_args(geometry.reversed if transposed else geometry)
        native.module().winograd_forward(args, *shape, *addresses, threads)
    else:
        args, keep = native.geometry_args(geometry, transposed)
        native.module().conv_gather(args, *shape, groups, *addresses, threads)
    del keep
    return out.to(dtype)
