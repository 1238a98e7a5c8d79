"""Launcher of csrc/group_norm_cpu.cpp."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.group_norm.images import patch_starts
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)


def forward(features, weight, bias, groups, eps, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, bias = computing(features, weight, bias)
    starts, (batch, channels) = patch_starts(patches), (patches.batch, x.shape[1])
    out, mean, rstd = torch.empty_like(x), x.new_empty(batch, groups), x.new_empty(batch, groups)
    native.check_plain(starts)
    native.module().group_norm_forward(
        (address(starts), batch, side * side), x.element_size(), channels, groups, address(x), address(weight),
        address(bias), eps, address(out), address(mean), address(rstd), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(features.dtype), mean, rstd


def backward(grad, features, weight, mean, rstd, patches, side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, grad, weight = computing(features, grad, weight)
    starts, (batch, groups), channels = patch_starts(patches), mean.shape, x.shape[1]
    out, grad_weight, grad_bias = torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)
    native.check_plain(starts)
    native.module().group_norm_backward(
        (address(starts), batch, side * side), x.element_size(), channels, groups, address(grad), address(x),
        address(weight), address(mean), address(rstd), address(out), address(grad_weight), address(grad_bias),
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(features.dtype), grad_weight, grad_bias
