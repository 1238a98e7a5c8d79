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

    def forward(self, kind: str, features: torch.Tensor, fill: torch.Tensor | None, *arguments) -> tuple:
        """Maps (B, C, gh * side, gw * side) of the rows that `<kind>_forward(features, *arguments)` gives, with `fill`
        where masked, and its mean and reciprocal deviation."""
        function = getattr(self.norm, f"{kind}_forward")
        if hasattr(self.norm, "WRITES_MAPS"):
            return function(features, *arguments, maps=(self.patches, self.side, fill))
        rows, mean, rstd = function(features, *arguments)
        return self.copies.scatter(rows.to(features.dtype), self.patches, self.side, fill), mean, rstd

    def backward(self, kind: str, grad: torch.Tensor, *arguments) -> tuple:
        """`<kind>_backward(rows of grad, *arguments)`: gradients of features, weight and bias."""
        function = getattr(self.norm, f"{kind}_backward")
        if hasattr(self.norm, "WRITES_MAPS"):
            return function(grad, *arguments, maps=(self.patches, self.side, None))
        return function(self.copies.gather(grad, self.patches), *arguments)

    def grad_fill(self, grad: torch.Tensor) -> torch.Tensor:
        """Sum (C,) of the gradient over the masked pixels."""
        return self.copies.sum_masked(grad, self.patches)
