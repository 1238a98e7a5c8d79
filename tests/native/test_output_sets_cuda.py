"""The CUDA kernels from one set of pixels to another, which the general op gives them, against the reference."""

from __future__ import annotations

import pytest
import torch

from spark_fast.ops.conv import cuda as conv
from spark_fast.ops.depthwise import cuda as depthwise
from spark_fast.ops.depthwise import reference as depthwise_reference
from spark_fast.ops.output_sets import geometry
from spark_fast.ops.pool import cuda as pool
from spark_fast.ops.pool import reference as pool_reference
from spark_fast.ops.window import Geometry, Window
from spark_fast.patches import ActivePatches

WINDOWS = {
    "3x3": Window((3, 3), padding=(1, 1)),
    "3x3 stride 2": Window((3, 3), (2, 2), (1, 1)),
    "5x5 stride 2": Window((5, 5), (2, 2), (2, 2)),
    "7x7 stride 2": Window((7, 7), (2, 2), (3, 3)),
    "7x7, larger map": Window((7, 7), padding=(5, 5)),
    "2x2 stride 2": Window((2, 2), (2, 2)),
    "3x3 dilated stride 3": Window((3, 3), (3, 3), (2, 2), (2, 2)),
}


def place(name: str, output: str, device: str) -> Geometry:
    active = torch.rand(3, 9, 21) < 0.3
    active[1] = False
    return geometry(ActivePatches(active.to(device)), 1, WINDOWS[name], output)


CASES = [
    (name, output)
    for name in WINDOWS
    for output in ("mask", "dilated")
    if (name, output) not in {("3x3", "mask"), ("7x7, larger map", "mask")}
]


@pytest.mark.parametrize(("name", "output"), CASES)
def test_depthwise(name: str, output: str, device: str) -> None:
    found = place(name, output, device)
    assert found.source is not found.query
    for channels in (5, 66):
        features = torch.randn(found.rows_in, channels).to(device)
        weight = torch.randn(channels, 1, *found.window.kernel).to(device)
        bias, grad = torch.randn(channels).to(device), torch.randn(found.rows_out, channels).to(device)
        for function, arguments in (
            ("forward", (features, weight, bias, found)),
            ("grad_input", (grad, weight, found)),
            ("grad_weight", (grad, features, found, weight)),
        ):
            ours = getattr(depthwise, function)(*arguments)
            exact = [t.double() if torch.is_tensor(t) else t for t in arguments]
            expected = getattr(depthwise_reference, function)(*exact)
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "output"), CASES)
def test_max_pooling(name: str, output: str, device: str) -> None:
    found = place(name, output, device)
    features = torch.randn(found.rows_in, 7).mul(2).round().to(device)
    out, argmax = pool.max_forward(features, found)
    expected, taps = pool_reference.max_forward(features, found)
    assert torch.equal(out, expected) and torch.equal(argmax, taps)
    grad = torch.randn(found.rows_out, 7).to(device)
    theirs = pool_reference.max_grad_input(grad, argmax, found)
    torch.testing.assert_close(pool.max_grad_input(grad, argmax, found), theirs)


def test_convolution_leaves_other_sets_to_other_backends() -> None:
    rows = torch.zeros(1, 8, dtype=torch.bfloat16)
    found = place("3x3", "dilated", "cpu")
    assert "same patches before and after" in conv.unsupported(
        rows, torch.zeros(8, 8, 3, 3, dtype=rows.dtype), found, 1
    )
