"""Depthwise convolutions: 7x7 of ConvNeXt-T at its four stages, 3x3 and 5x5 of EfficientNet-B0."""

from __future__ import annotations

import pytest

from bench.harness import run_case
from bench.layers import Layer, Problem


def _depthwise(net: str, side: int, channels: int, kernel: int, stride: int = 1) -> Layer:
    return Layer(net, side, channels, channels, kernel, stride, groups=channels)


LAYERS = [
    *(_depthwise("convnext", side, c, 7) for side, c in ((8, 96), (4, 192), (2, 384), (1, 768))),
    _depthwise("efficientnet", 16, 32, 3),
    _depthwise("efficientnet", 16, 96, 3, stride=2),
    _depthwise("efficientnet", 8, 144, 3),
    _depthwise("efficientnet", 8, 144, 5, stride=2),
    _depthwise("efficientnet", 4, 240, 5),
    _depthwise("efficientnet", 2, 672, 5),
    _depthwise("efficientnet", 2, 672, 5, stride=2),
    _depthwise("efficientnet", 1, 1152, 5),
]
CASES = [
    pytest.param(layer, direction, id=f"{layer.net}-{layer.name}-{direction}")
    for layer in LAYERS
    for direction in ("forward", "grad_input", "grad_weight")
]


@pytest.mark.parametrize(("layer", "direction"), CASES)
def test_depthwise(benchmark, ceilings, layer: Layer, direction: str) -> None:
    problem = Problem(layer)
    run_case(
        benchmark, ceilings, direction, problem.sides(), problem.work(direction), problem.terms(direction),
        kind="op", op="depthwise", **problem.info(),
    )  # fmt: skip
