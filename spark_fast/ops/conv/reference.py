"""The meaning of the convolution: dense, on the zero-filled map, then the active pixels of the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spark_fast.ops.densify.reference import gather, scatter
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    window = geometry.window
    dense = scatter(features, geometry.source, geometry.patch_in, None)
    out = F.conv2d(dense, weight, bias, window.stride, window.padding, window.dilation, groups)
    return gather(out, geometry.query)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    features = grad.new_zeros(geometry.rows_in, weight.shape[1] * groups)
    return _vjp(lambda x: forward(x, weight, None, geometry, groups), features, grad)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    return _vjp(lambda w: forward(features, w, None, geometry, groups), weight, grad)


def _vjp(function, at: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        out = function(at)
        if not out.requires_grad:  # of no active pixel
            return torch.zeros_like(at)
        return torch.autograd.grad(out, at, grad, allow_unused=True, materialize_grads=True)[0]
