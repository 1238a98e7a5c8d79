"""The meaning of the convolution: dense, on the zero-filled map, then the active pixels of the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import grad as formula

from spark_fast.ops.densify.reference import gather, scatter
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    window = geometry.window
    return gather(F.conv2d(_source(features, geometry), weight, bias, *_settings(window), groups), geometry.query)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    (left, right, top, bottom), (height, width) = _pads(geometry), geometry.size_in
    size = (geometry.source.batch, weight.shape[1] * groups, height + top + bottom, width + left + right)
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    found = formula.conv2d_input(size, weight, dense, *_settings(geometry.window), groups)
    return gather(F.pad(found, (-left, -right, -top, -bottom)), geometry.source)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    source = _source(features, geometry)
    return formula.conv2d_weight(source, weight.shape, dense, *_settings(geometry.window), groups)


def _settings(window) -> tuple:
    return window.stride, 0, window.dilation


def _source(features, geometry: Geometry) -> torch.Tensor:
    return F.pad(scatter(features, geometry.source, geometry.patch_in, None), _pads(geometry))


def _pads(geometry: Geometry) -> tuple[int, ...]:
    """Left, right, top and bottom, as F.pad has them: as far as the windows reach, which may be short of the map's end,
    or beyond its padding (a pooling with ceil_mode)."""
    window, pads = geometry.window, []
    for axis in (1, 0):
        reach = (geometry.size_out[axis] - 1) * window.stride[axis]
        reach += window.dilation[axis] * (window.kernel[axis] - 1) + 1
        pads += [window.padding[axis], reach - window.padding[axis] - geometry.size_in[axis]]
    return tuple(pads)
