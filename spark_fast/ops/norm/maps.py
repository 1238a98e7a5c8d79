"""Norms that end in dense maps, for scatter.py and graph.py: in one pass where the norm's backend has kernels for it
(WRITES_MAPS), elsewhere by its norm and a copy."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from spark_fast.patches import ActivePatches


@dataclass(frozen=True)
class Maps:
    """Dense maps of `patches` that are `side` pixels wide, and the backends of the norm and of copies."""

    patches: ActivePatches
    side: int
    norm: ModuleType
    copies: ModuleType

    def batch_norm(self, features, fill, mean, rstd, weight, bias) -> torch.Tensor:
        """Maps (B, C, gh * side, gw * side) of normalised rows, with `fill` (C,) or 0 where masked."""
        return self._write(self.norm.batch_apply, fill, features, None, mean, rstd, weight, bias, None)

    def batch_norm_backward(self, grad, features, mean, rstd, weight, bias, training: bool) -> tuple:
        """Gradients of features, weight and bias; `grad` is that of the maps."""
        saved = (features, None, mean, rstd, weight, bias, training, None)
        return self._read(self.norm.batch_norm_backward, grad, *saved)[:3]

    def layer_norm(self, features, fill, weight, bias, eps: float) -> tuple:
        """Maps as those of `batch_norm`, and the mean and the reciprocal deviation of each row."""
        return self._write(self.norm.layer_norm_forward, fill, features, weight, bias, eps)

    def layer_norm_backward(self, grad, features, mean, rstd, weight, bias) -> tuple:
        """Gradients of features, weight and bias; `grad` is that of the maps."""
        return self._read(self.norm.layer_norm_backward, grad, features, weight, bias, mean, rstd)

    def grad_fill(self, grad: torch.Tensor) -> torch.Tensor:
        """Sum (C,) of the gradient over the masked pixels."""
        return self.copies.sum_masked(grad, self.patches)

    def _write(self, norm, fill: torch.Tensor | None, features: torch.Tensor, *arguments):
        """What `norm(features, *arguments)` gives, with maps in place of the rows."""
        if hasattr(self.norm, "WRITES_MAPS"):
            return norm(features, *arguments, maps=(self.patches, self.side, fill))
        out = norm(features, *arguments)
        rows, *statistics = out if isinstance(out, tuple) else (out,)
        maps = self.copies.scatter(rows.to(features.dtype), self.patches, self.side, fill)
        return (maps, *statistics) if statistics else maps

    def _read(self, backward, grad: torch.Tensor, *arguments) -> tuple:
        if hasattr(self.norm, "WRITES_MAPS"):
            return backward(grad, *arguments, maps=(self.patches, self.side, None))
        return backward(self.copies.gather(grad, self.patches), *arguments)
