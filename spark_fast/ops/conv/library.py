"""PyTorch's convolution of the zero-filled map, between indexed copies. Nothing is skipped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn import grad as formula

from spark_fast.ops.densify.library import gather, scatter
from spark_fast.ops.window import Geometry
from spark_fast.patches import ActivePatches


def unsupported(features, weight, geometry: Geometry, groups: int) -> str | None:
    if geometry.window.is_symmetric:
        return None
    return f"PyTorch's convolution pads both ends alike; got {geometry.window}"


def forward(features, weight, bias, geometry: Geometry, groups: int) -> torch.Tensor:
    image = _image(features, geometry.source, geometry.size_in)
    return gather(F.conv2d(image, weight, bias, *_settings(geometry), groups), geometry.query)


def grad_input(grad, weight, geometry: Geometry, groups: int) -> torch.Tensor:
    size = (geometry.source.batch, weight.shape[1] * groups, *geometry.size_in)
    image = _image(grad, geometry.query, geometry.size_out)
    return gather(formula.conv2d_input(size, weight, image, *_settings(geometry), groups), geometry.source)


def grad_weight(grad, features, geometry: Geometry, groups: int, weight) -> torch.Tensor:
    source = _image(features, geometry.source, geometry.size_in)
    image = _image(grad, geometry.query, geometry.size_out)
    return formula.conv2d_weight(source, weight.shape, image, *_settings(geometry), groups)


def _settings(geometry: Geometry) -> tuple:
    return geometry.window.stride, geometry.window.padding, geometry.window.dilation


def _image(rows, patches: ActivePatches, size: tuple[int, int]) -> torch.Tensor:
    if patches.grid == (1, 1) and patches.per_image == 1:  # whole images: their rows are all pixels in order
        return rows.view(patches.batch, *size, rows.shape[1]).permute(0, 3, 1, 2)
    return scatter(rows, patches, size[0] // patches.grid[0], None)
