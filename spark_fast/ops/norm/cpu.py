"""Launcher of csrc/norm_cpu.cpp."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3}


def batch_statistics(features, running_mean, running_var, momentum, eps) -> tuple[torch.Tensor, torch.Tensor]:
    x, *running = computing(features, running_mean, running_var)
    mean, rstd = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    native.module().batch_statistics(
        x.element_size(), *x.shape, address(x), momentum, eps, *(address(r) for r in running), address(mean),
        address(rstd), torch.get_num_threads(),
    )  # fmt: skip
    for given, updated in zip((running_mean, running_var), running, strict=True):
        _write_back(given, updated)
    return mean, rstd


def batch_apply(features, residual, mean, rstd, weight, bias, activation, dtype=None) -> torch.Tensor:
    x, residual, mean, rstd, weight, bias = computing(features, residual, mean, rstd, weight, bias)
    out = torch.empty_like(x)
    native.module().batch_apply(
        x.element_size(), *x.shape, address(x), address(residual), address(mean), address(rstd), address(weight),
        address(bias), ACTIVATIONS[activation], address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype or features.dtype)


def batch_norm_backward(
    grad, features, residual, mean, rstd, weight, bias, training, activation
) -> tuple[torch.Tensor | None, ...]:
    x, grad, residual, mean, rstd, weight, bias = computing(features, grad, residual, mean, rstd, weight, bias)
    out, grad_weight, grad_bias = torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    grad_residual = None if residual is None else torch.empty_like(x)
    native.module().batch_norm_backward(
        x.element_size(), *x.shape, address(grad), address(x), address(residual), address(weight), address(bias),
        address(mean), address(rstd), training, ACTIVATIONS[activation], address(out), address(grad_residual),
        address(grad_weight), address(grad_bias), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(features.dtype), grad_weight, grad_bias, grad_residual


def layer_norm_forward(features, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, bias = computing(features, weight, bias)
    out, mean, rstd = torch.empty_like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    native.module().layer_norm_forward(
        x.element_size(), *x.shape, address(x), address(weight), address(bias), eps, address(out), address(mean),
        address(rstd), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(features.dtype), mean, rstd


def layer_norm_backward(grad, features, weight, bias, mean, rstd) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, grad, weight = computing(features, grad, weight)
    out, grad_weight, grad_bias = torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    native.module().layer_norm_backward(
        x.element_size(), *x.shape, address(grad), address(x), address(weight), address(mean), address(rstd),
        address(out), address(grad_weight), address(grad_bias), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(features.dtype), grad_weight, grad_bias


def _write_back(given: torch.Tensor | None, updated: torch.Tensor | None) -> None:
    if given is None:
        return
    if given.data_ptr() == updated.data_ptr():
        torch.autograd.graph.increment_version(given)  # the kernel wrote to it unseen
    else:
        given.copy_(updated)
