"""Which gradients are computed, and from what.

`wanted` tells for each of features, weight1, bias1, weight2 and bias2 whether its gradient is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch


def keeps(features, hidden, weight1, weight2, wanted: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """Of these four, those that the backward pass reads."""
    inside = any(wanted[:4])
    return (
        features if wanted[1] else None,
        hidden if inside else None,
        weight1 if wanted[0] else None,
        weight2 if inside else None,
    )


def gradients(run: ModuleType, grad, kept: Sequence[torch.Tensor | None], wanted: Sequence[bool]) -> tuple:
    """The five gradients, None where not wanted, by the backend `run`; `grad` is the output's, `kept` of `keeps`."""
    inside = run.backward(grad, *kept, wanted) if any(wanted[:4]) else (None,) * 4
    found = (*inside, grad.sum(0) if wanted[4] else None)
    return tuple(None if g is None else g.to(grad.dtype) for g in found)


def by_products(
    linear: ModuleType, grad_hidden: Callable, grad, features, hidden, weight1, weight2, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The first four gradients, for a backend without a pass of its own.

    Args:
        linear: the backend of ops/linear that multiplies.
        grad_hidden: of (grad, weight2, hidden, activated, bias) makes the gradient of what goes into the GELU (N, H)
            and, where `activated` and `bias` ask for them, what comes out of it (N, H) and the gradient of bias1.
    """
    before, activated, grad_bias1 = grad_hidden(grad, weight2, hidden, wanted[3], wanted[2])
    grad_weight2 = linear.grad_weight(grad, activated) if wanted[3] else None
    del activated  # as large as the hidden rows
    return (
        linear.grad_input(before, weight1) if wanted[0] else None,
        linear.grad_weight(before, features) if wanted[1] else None,
        grad_bias1,
        grad_weight2,
    )
