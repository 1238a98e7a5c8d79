"""PyTorch's own matrix products and GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spark_fast.ops.linear import library as linear
from spark_fast.ops.mlp.gradients import by_products


def forward(features, weight1, bias1, weight2, bias2, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden = linear.forward(features, weight1, bias1)
    return linear.forward(F.gelu(hidden), weight2, bias2), hidden if keep else None


def backward(grad, features, hidden, weight1, weight2, wanted) -> tuple[torch.Tensor | None, ...]:
    return by_products(linear, _grad_hidden, grad, features, hidden, weight1, weight2, wanted)


def _grad_hidden(grad, weight2, hidden, activated: bool, bias: bool) -> tuple[torch.Tensor | None, ...]:
    before = torch.ops.aten.gelu_backward(linear.grad_input(grad, weight2), hidden)
    return before, F.gelu(hidden) if activated else None, before.sum(0) if bias else None
