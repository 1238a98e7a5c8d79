"""The meaning of max pooling: over the window's taps of the zero-filled map, -inf beyond the border."""

from __future__ import annotations

import torch

from spark_fast.ops.window import OUTSIDE, Geometry


def max_forward(features, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (rows_out, C) and the winning tap of each value, int16 (-1 for a window wholly beyond the border)."""
    neighbors = geometry.neighbors  # (taps, rows_out)
    best = features.new_full((geometry.rows_out, features.shape[1]), -torch.inf)
    argmax = torch.full(best.shape, -1, dtype=torch.int16, device=features.device)
    zero_row = features.new_zeros(1, features.shape[1])
    padded = torch.cat((features, zero_row))
    for tap, rows in enumerate(neighbors):
        value = padded[torch.where(rows < 0, geometry.rows_in, rows)]
        inside = (rows != OUTSIDE)[:, None]
        wins = inside & ((value > best) | value.isnan() | (argmax < 0))
        best = torch.where(wins, value, best)
        argmax = torch.where(wins, tap, argmax).to(torch.int16)
    return best, argmax


def max_grad_input(grad, argmax, geometry: Geometry) -> torch.Tensor:
    out = grad.new_zeros(geometry.rows_in + 1, grad.shape[1])
    for tap, rows in enumerate(geometry.neighbors):
        target = torch.where(rows < 0, geometry.rows_in, rows)
        out.index_add_(0, target, torch.where(argmax == tap, grad, 0))
    return out[:-1]
