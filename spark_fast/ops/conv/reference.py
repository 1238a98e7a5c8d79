"""The meaning of the convolution: dense, on the zero-filled map, then the active pixels of the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import grad as formula

from spark_fast.ops.densify.reference import gather, scatter
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    window = geometry.window
    dense = scatter(features, geometry.source, geometry.patch_in, None)
    out = F.conv2d(dense, weight, bias, window.stride, window.padding, window.dilation, groups)
    return gather(out, geometry.query)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    window, size = geometry.window, (geometry.source.batch, weight.shape[1] * groups, *geometry.size_in)
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    found = formula.conv2d_input(size, weight, dense, window.stride, window.padding, window.dilation, groups)
    return gather(found, geometry.source)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    window = geometry.window
    source = scatter(features, geometry.source, geometry.patch_in, None)
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    return formula.conv2d_weight(source, weight.shape, dense, window.stride, window.padding, window.dilation, groups)
