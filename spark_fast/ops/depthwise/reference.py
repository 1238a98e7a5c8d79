"""The meaning of the depthwise convolution: the grouped one with a group per channel."""

from __future__ import annotations

import torch

from spark_fast.ops.conv import reference as conv
from spark_fast.ops.window import Geometry


def forward(features, weight, bias, geometry: Geometry) -> torch.Tensor:
    return conv.forward(features, weight, bias, geometry, weight.shape[0])


def grad_input(grad, weight, geometry: Geometry) -> torch.Tensor:
    return conv.grad_input(grad, weight, geometry, weight.shape[0])


def grad_weight(grad, features, geometry: Geometry, weight) -> torch.Tensor:
    return conv.grad_weight(grad, features, geometry, weight.shape[0], weight)
