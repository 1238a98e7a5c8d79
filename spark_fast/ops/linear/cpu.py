"""Launcher of csrc/linear_cpu.cpp."""

from __future__ import annotations

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)


def forward(features, weight, bias) -> torch.Tensor:
    return _product(features, weight, bias, transposed=False)


def grad_input(grad, weight) -> torch.Tensor:
    return _product(grad, weight, None, transposed=True)


def grad_weight(grad, features) -> torch.Tensor:
    dtype = grad.dtype
    grad, features = computing(grad, features)
    out = grad.new_empty(grad.shape[1], features.shape[1])
    native.module().linear_grad_weight(
        grad.element_size(), grad.shape[0], features.shape[1], grad.shape[1], address(features), address(grad),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)


def _product(x, weight, bias, transposed: bool) -> torch.Tensor:
    dtype, width = x.dtype, weight.shape[1 if transposed else 0]
    x, weight, bias = computing(x, weight, bias)
    out = x.new_empty(x.shape[0], width)
    native.module().linear_forward(
        x.element_size(), x.shape[0], x.shape[1], width, address(x), address(weight), transposed, address(bias),
        address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)
