"""The meaning of the convolution: dense, on the zero-filled map, then the active pixels of the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import grad as formula

from spark_fast.ops.densify.reference import gather, scatter
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    out = F.conv2d(_source(features, geometry), weight, bias, *_settings(geometry), groups)
    return gather(out, geometry.query)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    (height, width), (more_y, more_x) = geometry.size_in, _beyond(geometry)
    size = (geometry.source.batch, weight.shape[1] * groups, height + more_y, width + more_x)
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    found = formula.conv2d_input(size, weight, dense, *_settings(geometry), groups)
    return gather(found[:, :, :height, :width], geometry.source)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    dense = scatter(grad, geometry.query, geometry.patch_out, None)
    return formula.conv2d_weight(_source(features, geometry), weight.shape, dense, *_settings(geometry), groups)


def _settings(geometry: Geometry) -> tuple:
    return geometry.window.stride, geometry.window.padding, geometry.window.dilation


def _source(features, geometry: Geometry) -> torch.Tensor:
    more_y, more_x = _beyond(geometry)
    return F.pad(scatter(features, geometry.source, geometry.patch_in, None), (0, more_x, 0, more_y))


def _beyond(geometry: Geometry) -> tuple[int, int]:
    """How far the last windows reach beyond the padding, as those of a pooling with ceil_mode may."""
    window = geometry.window
    reach = (
        (geometry.size_out[axis] - 1) * window.stride[axis] + window.dilation[axis] * (window.kernel[axis] - 1) + 1
        for axis in (0, 1)
    )
    padded = (length + 2 * padding for length, padding in zip(geometry.size_in, window.padding, strict=True))
    return tuple(max(0, far - length) for far, length in zip(reach, padded, strict=True))
