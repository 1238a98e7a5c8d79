"""The meaning of the convolution: dense, on the zero-filled map, then the active pixels of the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import grad as formula

from spark_fast.ops.densify.reference import gather, scatter
from spark_fast.ops.window import Geometry, Window


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    dense = _padded(scatter(features, geometry.source, geometry.patch_in, None), geometry.window)
    out = F.conv2d(dense, weight, bias, geometry.window.stride, 0, geometry.window.dilation, groups)
    return gather(out, geometry.query)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    window, (height, width) = geometry.window, geometry.size_in
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    top, bottom, left, right = _ends(window)
    size = (geometry.source.batch, weight.shape[1] * groups, height + top + bottom, width + left + right)
    found = formula.conv2d_input(size, weight, dense, window.stride, 0, window.dilation, groups)
    return gather(F.pad(found, (-left, -right, -top, -bottom)), geometry.source)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    window = geometry.window
    source = _padded(scatter(features, geometry.source, geometry.patch_in, None), window)
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    return formula.conv2d_weight(source, weight.shape, dense, window.stride, 0, window.dilation, groups)


def _ends(window: Window) -> tuple[int, int, int, int]:
    """Padding at the top, bottom, left and right."""
    (top, left), extra = window.padding, window.extra
    return top, top + extra[0], left, left + extra[1]


def _padded(dense: torch.Tensor, window: Window) -> torch.Tensor:
    top, bottom, left, right = _ends(window)
    return F.pad(dense, (left, right, top, bottom))
