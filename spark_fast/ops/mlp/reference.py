"""The formulas, the GELU's in at least float32."""

from __future__ import annotations

import math

import torch

from spark_fast.ops.linear import reference as linear
from spark_fast.ops.mlp.gradients import by_products


def forward(features, weight1, bias1, weight2, bias2, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows (N, K) and, if `keep`, what goes into the GELU (N, H)."""
    hidden = linear.forward(features, weight1, bias1)
    x = _wide(hidden)
    activated = (x * _distribution(x)).to(hidden.dtype)
    return linear.forward(activated, weight2, bias2), hidden if keep else None


def backward(grad, features, hidden, weight1, weight2, wanted) -> tuple[torch.Tensor | None, ...]:
    """The wanted gradients of features, weight1, bias1 and weight2; what they do not need may be None."""
    return by_products(linear, _grad_hidden, grad, features, hidden, weight1, weight2, wanted)


def _grad_hidden(grad, weight2, hidden, activated: bool, bias: bool) -> tuple[torch.Tensor | None, ...]:
    x, before = _wide(hidden), _wide(linear.grad_input(grad, weight2))
    distribution, density = _distribution(x), torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    found = before * (distribution + x * density)
    out = (x * distribution).to(hidden.dtype) if activated else None
    return found.to(hidden.dtype), out, found.sum(0) if bias else None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _distribution(x: torch.Tensor) -> torch.Tensor:
    """The standard normal distribution function."""
    return (1 + torch.erf(x / math.sqrt(2))) / 2
