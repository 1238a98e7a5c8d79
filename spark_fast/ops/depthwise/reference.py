"""The meaning of the depthwise convolution: the grouped one with a group per channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spark_fast.ops.densify.reference import gather, scatter
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry) -> torch.Tensor:
    window = geometry.window
    dense = scatter(features, geometry.patches, geometry.side_in, None)
    out = F.conv2d(dense, weight, bias, window.stride, window.padding, window.dilation, features.shape[1])
    return gather(out, geometry.patches)


def grad_input(grad, weight, geometry: Geometry) -> torch.Tensor:
    features = grad.new_zeros(geometry.rows_in, grad.shape[1])
    return _vjp(lambda x: forward(x, weight, None, geometry), features, grad)


def grad_weight(grad, features, geometry: Geometry, weight) -> torch.Tensor:
    return _vjp(lambda w: forward(features, w, None, geometry), weight, grad)


def _vjp(function, at: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        out = function(at)
        if not out.requires_grad:  # of no active pixel
            return torch.zeros_like(at)
        return torch.autograd.grad(out, at, grad, allow_unused=True, materialize_grads=True)[0]
