"""Window ops on any set of pixels, to output sets of both kinds and back: every backend against dense PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact, value_and_grads
from pixels import SHAPE, dense_of, picked, points, set_by_hand
from torch import Tensor

import spark_fast as sf
from spark_fast.nn import functional as SF

DENSITIES = (0.05, 0.2, 0.5, 0.9)


def layer(kernel=3, stride=1, padding=1, dilation=1, channels=6, out=5, groups=1) -> dict:
    return {
        "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "channels": channels, "out": out,
        "groups": groups,
    }  # fmt: skip


def check_conv(layer: dict, coords: Tensor, dtype: torch.dtype, output: str = "mask", shape=SHAPE, device="cpu"):
    """Output set, values and gradients in the caller's order, of a convolution of the pixels `coords`."""
    generator = torch.Generator().manual_seed(1)
    sizes = (
        (len(coords), layer["channels"]),
        (layer["out"], layer["channels"] // layer["groups"], layer["kernel"], layer["kernel"]),
        (layer["out"],),
    )
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in sizes]
    settings = tuple(layer[name] for name in ("stride", "padding", "dilation", "groups"))
    coords, found = coords.to(device), []

    def sparse(x, w, b):
        y = SF.conv2d(sf.SparseTensor.from_coords(x, coords, shape), w, b, *settings, output=output)
        found.append(y)
        return y.features

    def dense(x, w, b):
        out = F.conv2d(dense_of(x, coords, shape), w, b, *settings)
        assert out.shape == found[0].shape
        return picked(out, found[0].coords)

    ours, our_grads = value_and_grads(sparse, *inputs)
    theirs, their_grads = value_and_grads(dense, *inputs)
    oracle, true_grads = value_and_grads(dense, *(t.double() for t in inputs))
    wanted = set_by_hand(coords, layer, tuple(found[0].shape[2:]), output)
    assert [tuple(c) for c in found[0].coords.tolist()] == sorted(wanted)
    taps = layer["kernel"] ** 2
    assert_as_exact(ours, theirs, oracle, "forward", taps * layer["channels"])
    terms = (taps * layer["out"], len(coords), len(coords))
    for what, mine, own, true, n in zip(("x", "w", "b"), our_grads, their_grads, true_grads, terms, strict=True):
        assert_as_exact(mine, own, true, f"grad {what}", n)


LAYERS = {
    "3x3": (layer(), "mask"),
    "3x3 depthwise": (layer(out=6, groups=6), "mask"),
    "5x5 dilated taps": (layer(kernel=5, padding=4, dilation=2, out=3), "mask"),
    "stride 2": (layer(stride=2), "mask"),
    "stride 2, more channels": (layer(stride=2, channels=12, out=10), "mask"),
    "dilated set, more channels": (layer(stride=2, channels=12, out=10), "dilated"),
    "stride 2 depthwise": (layer(stride=2, out=6, groups=6), "mask"),
    "stride 2 grouped": (layer(stride=2, out=4, groups=2), "mask"),
    "stride 3, pixels left over": (layer(stride=3, padding=0), "mask"),
    "2x2 stride 2": (layer(kernel=2, stride=2, padding=0), "mask"),
    "1x1 stride 2": (layer(kernel=1, stride=2, padding=0), "mask"),
    "dilated set": (layer(), "dilated"),
    "dilated set, stride 2": (layer(stride=2), "dilated"),
    "dilated set, larger map": (layer(padding=2), "dilated"),
    "dilated set, smaller map": (layer(padding=0), "dilated"),
    "dilated set, depthwise": (layer(stride=2, out=6, groups=6), "dilated"),
    "dilated set, dilated taps": (layer(stride=2, padding=0, dilation=2), "dilated"),
    "dilated set, 1x1": (layer(kernel=1, padding=0), "dilated"),
}


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_submanifold_convolution_of_random_pixels(density, dtype, backend):
    with sf.use_backend(backend):
        check_conv(layer(channels=7, out=17), points(density), dtype)


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_sets_and_values(name, backend):
    settings, output = LAYERS[name]
    for density in (0.1, 0.6):
        with sf.use_backend(backend):
            check_conv(settings, points(density), torch.float64, output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_output_sets_and_values_on_triton(name, dtype, on_triton):
    settings, output = LAYERS[name]
    check_conv(settings, points(0.3, (2, 5, 6)), dtype, output, (2, 5, 6), on_triton)


@pytest.mark.parametrize("density", DENSITIES)
def test_random_pixels_on_triton(density, on_triton):
    check_conv(layer(channels=17, out=9), points(density, (3, 7, 9)), torch.float32, "mask", (3, 7, 9), on_triton)


@pytest.mark.parametrize("channels", [64, 3])
def test_half_precision_and_wide_rows(channels):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_conv(layer(channels=channels, out=32, stride=2), points(0.3), dtype)


def test_two_output_sets_of_one_window_are_not_mixed_up(on_triton):
    """What a backend keeps with the input's patches must know the output's."""
    coords = points(0.3, (2, 5, 6))
    x = sf.SparseTensor.from_coords(torch.randn(len(coords), 9), coords, (2, 5, 6))
    x = sf.SparseTensor(x.features.to(on_triton), sf.ActivePatches(x.patches.active.to(on_triton)), 1)
    w, dense = torch.randn(10, 9, 3, 3).to(on_triton), x.to_dense()
    for output in ("mask", "dilated", "mask"):
        rows = x.features.clone().requires_grad_()
        y = SF.conv2d(x.with_features(rows), w, None, 2, 1, output=output)
        torch.testing.assert_close(y.features, picked(F.conv2d(dense, w, None, 2, 1), y.coords), atol=1e-5, rtol=1e-4)
        zero_filled = torch.zeros(2, 10, *y.shape[2:], device=on_triton)
        zero_filled.permute(0, 2, 3, 1)[tuple(y.coords.long().T)] = 1
        expected = picked(F.conv_transpose2d(zero_filled, w, None, 2, 1, (0, 1)), x.coords)
        y.features.sum().backward()
        torch.testing.assert_close(rows.grad, expected, atol=1e-5, rtol=1e-4)


POOLS = {
    "max 3x3 stride 2": ("max", (3, 2, 1), {}),
    "max 2x2": ("max", (2,), {}),
    "max 2x2 ceil": ("max", (2,), {"ceil_mode": True}),
    "avg 3x3 stride 2": ("avg", (3, 2, 1), {}),
    "avg 2x2 ceil, inside only": ("avg", (2, 2), {"ceil_mode": True, "count_include_pad": False}),
    "avg 3x3 stride 2, inside only": ("avg", (3, 2, 1), {"count_include_pad": False}),
    "avg with a divisor": ("avg", (3, 2, 1), {"divisor_override": 5}),
}


def check_pool(name: str, output: str, coords: Tensor, shape: tuple[int, int, int], dtype, device="cpu") -> None:
    kind, sizes, options = POOLS[name]
    ours_of = SF.max_pool2d if kind == "max" else SF.avg_pool2d
    dense_pool = F.max_pool2d if kind == "max" else F.avg_pool2d
    features, coords, found = torch.randn(len(coords), 5, dtype=torch.float64), coords.to(device), []

    def sparse(x):
        found.append(ours_of(sf.SparseTensor.from_coords(x, coords, shape), *sizes, **options, output=output))
        return found[-1].features

    def dense(x):
        out = dense_pool(dense_of(x, coords, shape), *sizes, **options)
        assert out.shape == found[0].shape
        return picked(out, found[0].coords)

    features = features.to(device, dtype)
    ours, our_grads = value_and_grads(sparse, features)
    theirs, their_grads = value_and_grads(dense, features)
    oracle, true_grads = value_and_grads(dense, features.double())
    kernel, stride, padding = (*sizes, sizes[0], 0)[:3] if len(sizes) == 1 else (*sizes, 0)[:3]
    wanted = set_by_hand(coords, layer(kernel, stride, padding), tuple(found[0].shape[2:]), output)
    assert [tuple(c) for c in found[0].coords.tolist()] == sorted(wanted)
    assert_as_exact(ours, theirs, oracle, "forward", 9)
    assert_as_exact(our_grads[0], their_grads[0], true_grads[0], "grad", 9)


@pytest.mark.parametrize("output", ["mask", "dilated"])
@pytest.mark.parametrize("name", POOLS)
def test_pooling_of_random_pixels(name, output):
    for density in (0.1, 0.6):
        check_pool(name, output, points(density), SHAPE, torch.float64)
    with sf.use_backend("reference"):
        check_pool(name, output, points(0.3), SHAPE, torch.float64)


@pytest.mark.parametrize("output", ["mask", "dilated"])
@pytest.mark.parametrize("name", POOLS)
def test_pooling_of_random_pixels_on_triton(name, output, on_triton):
    check_pool(name, output, points(0.4, (2, 5, 6)), (2, 5, 6), torch.float32, on_triton)


TRANSPOSED = {  # kernel, stride, padding, output_padding, dilation, in, out, groups, side
    "2x2 stride 2": (2, 2, 0, 0, 1, 4, 6, 1, 1),
    "4x4 stride 2": (4, 2, 1, 0, 1, 5, 3, 1, 2),
    "3x3 stride 2": (3, 2, 1, 1, 1, 4, 6, 2, 3),
    "3x3 stride 1": (3, 1, 1, 0, 1, 17, 16, 1, 4),
    "3x3 dilated": (3, 1, 2, 0, 2, 4, 5, 1, 1),
    "depthwise": (4, 2, 1, 0, 1, 6, 6, 6, 2),
    "stride 3": (3, 3, 0, 0, 1, 3, 4, 1, 2),
    "1x1": (1, 1, 0, 0, 1, 3, 4, 1, 2),
}


def check_transposed(name: str, dtype: torch.dtype, device="cpu") -> None:
    kernel, stride, padding, output_padding, dilation, inc, out, groups, side = TRANSPOSED[name]
    active = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [0, 0, 1]]], dtype=torch.bool, device=device)
    patches = sf.ActivePatches(active)
    sizes = ((patches.rows(side), inc), (inc, out // groups, kernel, kernel), (out,))
    inputs = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in sizes]
    settings = (stride, padding, output_padding, groups, dilation)

    def sparse(x, w, b):
        y = F.conv_transpose2d(sf.SparseTensor(x, patches, side), w, b, *settings)
        assert y.patches is patches and y.side == side * stride
        return y.to_dense()

    def dense(x, w, b):
        whole = F.conv_transpose2d(sf.SparseTensor(x, patches, side).to_dense(), w, b, *settings)
        mask = active.repeat_interleave(side * stride, 1).repeat_interleave(side * stride, 2)
        return whole * mask[:, None]

    ours, our_grads = value_and_grads(sparse, *inputs)
    theirs, their_grads = value_and_grads(dense, *inputs)
    oracle, true_grads = value_and_grads(dense, *(t.double() for t in inputs))
    taps, rows = kernel**2, patches.rows(side * stride)
    assert_as_exact(ours, theirs, oracle, "forward", taps * inc)
    terms = (taps * out, rows, rows)
    for what, mine, own, true, n in zip(("x", "w", "b"), our_grads, their_grads, true_grads, terms, strict=True):
        assert_as_exact(mine, own, true, f"grad {what}", n)


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution_of_patches(name, backend, recwarn):
    with sf.use_backend(backend):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            check_transposed(name, dtype)
    assert not [w for w in recwarn if "dense" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution_on_triton(name, dtype, on_triton):
    check_transposed(name, dtype, on_triton)


def check_inverse(kernel, stride, padding, output, dtype, groups=1, shape=SHAPE, density=0.3, device="cpu") -> None:
    """Down with a strided convolution, and back onto the pixels that it came from."""
    coords = points(density, shape).to(device)
    inc, middle = 12, 10 if groups == 1 else 12
    sizes = ((len(coords), inc), (middle, inc, kernel, kernel), (middle, inc // groups, kernel, kernel), (inc,))
    inputs = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in sizes]
    found = []

    def sparse(x, down, up, b):
        x = sf.SparseTensor.from_coords(x, coords, shape)
        y = SF.conv2d(x, down, None, stride, padding, output=output)
        z = SF.conv_transpose2d(y, up, b, stride, padding, groups=groups, output=x)
        assert z.patches is x.patches and z.shape == (shape[0], inc, *shape[1:])
        found.append(y)
        return z.features_at(coords)

    def dense(x, down, up, b):
        y = F.conv2d(dense_of(x, coords, shape), down, None, stride, padding)
        y = dense_of(picked(y, found[0].coords), found[0].coords.long(), (shape[0], *y.shape[2:]))
        rest = [n - ((m - 1) * stride - 2 * padding + kernel) for n, m in zip(shape[1:], y.shape[2:], strict=True)]
        return picked(F.conv_transpose2d(y, up, b, stride, padding, rest, groups), coords)

    ours, our_grads = value_and_grads(sparse, *inputs)
    theirs, their_grads = value_and_grads(dense, *inputs)
    oracle, true_grads = value_and_grads(dense, *(t.double() for t in inputs))
    taps = kernel**4 * inc * middle
    assert_as_exact(ours, theirs, oracle, "forward", taps)
    terms = (taps, kernel**2 * len(coords) * middle, kernel**2 * len(coords) * inc, len(coords))
    for what, mine, own, true, n in zip(
        ("x", "down", "up", "b"), our_grads, their_grads, true_grads, terms, strict=True
    ):
        assert_as_exact(mine, own, true, f"grad {what}", n)


INVERSES = [(3, 2, 1, "mask"), (3, 2, 1, "dilated"), (2, 2, 0, "mask"), (3, 1, 1, "dilated"), (3, 3, 0, "dilated")]


@pytest.mark.parametrize("backend", ["cpu", "library", "reference"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "output"), INVERSES)
def test_inverse_convolution_onto_the_pixels_it_came_from(kernel, stride, padding, output, backend):
    with sf.use_backend(backend):
        check_inverse(kernel, stride, padding, output, torch.float64)
        check_inverse(kernel, stride, padding, output, torch.float64, groups=4)


@pytest.mark.parametrize(("kernel", "stride", "padding", "output"), INVERSES)
def test_inverse_convolution_on_triton(kernel, stride, padding, output, on_triton):
    check_inverse(kernel, stride, padding, output, torch.float32, shape=(2, 5, 6), device=on_triton)
    check_inverse(kernel, stride, padding, output, torch.float32, 4, (2, 5, 6), device=on_triton)
