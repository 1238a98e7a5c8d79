"""Launcher of csrc/linear_cpu.cpp; float32 and float64. In half precision PyTorch's product uses what the processor
has for it, and runs instead."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)

OURS = (torch.float32, torch.float64)


def forward(features, weight, bias) -> torch.Tensor:
    if features.dtype not in OURS:
        return torch.nn.functional.linear(features, weight, bias)
    return _product(*computing(features, weight, bias), transposed=False)


def grad_input(grad, weight) -> torch.Tensor:
    if grad.dtype not in OURS:
        return grad @ weight
    return _product(*computing(grad, weight, None), transposed=True)


def grad_weight(grad, features) -> torch.Tensor:
    if grad.dtype not in OURS:
        return grad.t() @ features
    grad, features = computing(grad, features)
    out = grad.new_empty(grad.shape[1], features.shape[1])
    native.module().linear_grad_weight(
        grad.element_size(), grad.shape[0], features.shape[1], grad.shape[1], address(features), address(grad),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _product(x, weight, bias, transposed: bool) -> torch.Tensor:
    width = weight.shape[1 if transposed else 0]
    out = x.new_empty(x.shape[0], width)
    native.module().linear_forward(
        x.element_size(), x.shape[0], x.shape[1], width, address(x), address(weight), transposed, address(bias),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out
