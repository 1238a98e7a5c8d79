"""Launcher of csrc/mlp_cpu.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spark_fast.ops import native
from spark_fast.ops.native import address, computing, unavailable  # noqa: F401  (unavailable: asked by ops.backend)


def forward(features, weight1, bias1, weight2, bias2, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, weight1, bias1, weight2, bias2 = computing(features, weight1, bias1, weight2, bias2)
    hidden = x.new_empty(x.shape[0], weight1.shape[0]) if keep else None
    out = x.new_empty(x.shape[0], weight2.shape[0])
    native.module().mlp_forward(
        x.element_size(), *x.shape, *weight2.shape[::-1], address(x), address(weight1), address(bias1),
        address(weight2), address(bias2), address(hidden), address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(features.dtype), hidden.to(features.dtype) if keep else None


def backward(grad, features, hidden, weight1, weight2, wanted: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    grad, x, hidden, weight1, weight2 = computing(grad, features, hidden, weight1, weight2)
    (rows, width), outputs = hidden.shape, grad.shape[1]
    channels = x.shape[1] if wanted[1] else weight1.shape[1] if wanted[0] else 0
    shapes = ((rows, channels), (width, channels), (width,), (outputs, width))
    found = [grad.new_empty(shape) if w else None for shape, w in zip(shapes, wanted, strict=False)]
    native.module().mlp_backward(
        grad.element_size(), rows, channels, width, outputs, address(grad), address(x), address(hidden),
        address(weight1), address(weight2), *map(address, found), torch.get_num_threads(),
    )  # fmt: skip
    return tuple(found)
