"""Convolutions of ResNet-50 and -101, ConvNeXt-T and -S, EfficientNet-B0 (1x1), and ResNet's stem.

Dense is PyTorch's channels-last convolution on a map that is zero-filled beforehand: masking is not counted. For
ConvNeXt's layers written as Linear there are two dense forms, of which the faster counts.
"""

from __future__ import annotations

import pytest

from bench.harness import run_case
from bench.layers import Layer, Problem

LAYERS = [
    *(Layer("resnet", side, c, c) for side, c in ((8, 64), (4, 128), (2, 256), (1, 512))),
    *(Layer("resnet", side, c, c, stride=2) for side, c in ((8, 128), (4, 256), (2, 512))),
    *(Layer("resnet", side, 4 * c, c, kernel=1) for side, c in ((8, 64), (4, 128), (2, 256), (1, 512))),
    *(Layer("resnet", side, c, 4 * c, kernel=1) for side, c in ((8, 64), (4, 128), (2, 256), (1, 512))),
    Layer("resnet", 8, 256, 512, kernel=1, stride=2),
    Layer("resnet", 32, 3, 64, kernel=7, stride=2),
    *(Layer("convnext", side, c, 4 * c, 1, linear=True) for side, c in ((8, 96), (4, 192), (2, 384), (1, 768))),
    *(Layer("convnext", side, 4 * c, c, 1, linear=True) for side, c in ((8, 96), (2, 384))),
    Layer("convnext", 32, 3, 96, kernel=4, stride=4),
    *(Layer("convnext", side, c, 2 * c, 2, 2) for side, c in ((8, 96), (4, 192), (2, 384))),
    *(Layer("efficientnet", side, a, b, 1) for side, a, b in ((16, 16, 96), (8, 24, 144), (4, 240, 40), (2, 80, 480))),
]
CASES = [
    pytest.param(layer, direction, id=f"{layer.net}-{layer.name}-{direction}")
    for layer in LAYERS
    for direction in ("forward", "grad_input", "grad_weight")
    if direction != "grad_input" or layer.channels > 3  # nobody asks for the gradient of the images
]


@pytest.mark.parametrize(("layer", "direction"), CASES)
def test_conv(benchmark, ceilings, layer: Layer, direction: str) -> None:
    problem = Problem(layer)
    run_case(
        benchmark, ceilings, direction, problem.sides(), problem.work(direction), problem.terms(direction),
        kind="op", op="conv", **problem.info(),
    )  # fmt: skip
