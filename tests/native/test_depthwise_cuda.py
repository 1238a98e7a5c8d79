"""csrc/depthwise_cuda.cu and depthwise_weight_cuda.cu against the float64 reference: on the CPU, and on a GPU."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from cuda_shim import MASKS, guarded
from exactness import assert_as_exact, value_and_grads

from spark_fast.ops import native_cuda
from spark_fast.ops.depthwise import cuda, reference
from spark_fast.ops.depthwise.api import DepthwiseFunction
from spark_fast.ops.window import Geometry, Window
from spark_fast.patches import ActivePatches

# channels, window, side. Tiles are 16 pixels, or a patch of 8 to 16; segments 8, 4, 2 or 1 pixels.
SHAPES = {
    "7x7": (65, Window((7, 7), padding=(3, 3)), 4),
    "7x7 side 1": (7, Window((7, 7), padding=(3, 3)), 1),
    "7x7 side 2": (8, Window((7, 7), padding=(3, 3)), 2),
    "7x7 side 8": (10, Window((7, 7), padding=(3, 3)), 8),
    "5x5 side 5": (6, Window((5, 5), padding=(2, 2)), 5),
    "5x5 parts of a patch": (4, Window((5, 5), padding=(2, 2)), 18),
    "3x3 side 3": (72, Window((3, 3), padding=(1, 1)), 3),
    "3x3 stride 2": (40, Window((3, 3), (2, 2), (1, 1)), 2),
    "5x5 stride 2": (16, Window((5, 5), (2, 2), (2, 2)), 8),
    "7x7 stride 2": (3, Window((7, 7), (2, 2), (3, 3)), 6),
    "5x5 dilated": (3, Window((5, 5), padding=(4, 4), dilation=(2, 2)), 2),
    "1x1": (19, Window((1, 1)), 2),
    "4x4 stride 2": (24, Window((4, 4), (2, 2), (1, 1)), 4),
    "3x7": (12, Window((3, 7), (1, 1), (1, 3)), 4),
    "15x15, more weights than fit": (5, Window((15, 15), padding=(7, 7)), 1),
}


def inputs_for(name: str, dtype: torch.dtype, patches: ActivePatches) -> tuple[list[torch.Tensor], Geometry]:
    channels, window, side = SHAPES[name]
    geometry = Geometry.of(patches, side, window)
    sizes = ((geometry.rows_in, channels), (channels, 1, *window.kernel), (channels,))
    return [torch.randn(size).to(patches.device, dtype) for size in sizes], geometry


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name: str, patches: ActivePatches) -> None:
    check(name, torch.float32, patches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_half_precision_equals_the_reference(name: str, dtype: torch.dtype, device: str) -> None:
    check(name, dtype, ActivePatches(torch.tensor(MASKS["equal"]).bool().to(device)))


def check(name: str, dtype: torch.dtype, patches: ActivePatches) -> None:
    inputs, geometry = inputs_for(name, dtype, patches)
    assert cuda.unsupported(*inputs[:2], geometry) is None

    def run(backend):
        return lambda *tensors: DepthwiseFunction.apply(*tensors, geometry, backend)

    ours, our_grads = value_and_grads(run(cuda), *inputs)
    theirs, their_grads = value_and_grads(run(reference), *inputs)
    oracle, grads = value_and_grads(run(reference), *(t.double() for t in inputs))
    assert ours.dtype == dtype
    taps, rows = geometry.window.taps, geometry.rows_out
    assert_as_exact(ours, theirs, oracle, "forward", taps)
    for what, mine, own, true, terms in zip(
        ("input", "weight", "bias"), our_grads, their_grads, grads, (taps, rows, rows), strict=True
    ):
        assert mine.dtype == dtype
        assert_as_exact(mine, own, true, f"grad {what}", terms)


def test_source_and_query_patches_may_differ(device: str) -> None:
    """From sparse rows to dense maps, whose patches are whole images, and back for the gradient."""
    patches = ActivePatches(torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 0, 1], [1, 0, 0]]]).bool().to(device))
    for window in (Window((7, 7), padding=(3, 3)), Window((3, 3), (2, 2), (1, 1)), Window((3, 3), padding=(3, 3))):
        geometry = Geometry.densifying(patches, 4, window)
        inputs = [torch.randn(size).to(device) for size in ((patches.rows(4), 6), (6, 1, *window.kernel), (6,))]
        ours, our_grads = value_and_grads(lambda *t, g=geometry: DepthwiseFunction.apply(*t, g, cuda), *inputs)
        dense = torch.zeros(2, 6, 8, 12, dtype=torch.float64, device=device)
        tiles = dense.unflatten(3, (3, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1)

        def whole(rows, weight, bias, window=window, tiles=tiles, dense=dense):
            filled = tiles.index_put(patches.index, rows.view(-1, 4, 4, 6))  # (B, gh, gw, side, side, C)
            images = filled.permute(0, 5, 1, 3, 2, 4).reshape(dense.shape)
            out = torch.nn.functional.conv2d(images, weight, bias, window.stride, window.padding, groups=6)
            return out.permute(0, 2, 3, 1).reshape(-1, 6)

        oracle, grads = value_and_grads(whole, *(t.double() for t in inputs))
        for mine, true in zip((ours, *our_grads), (oracle, *grads), strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(16))
def test_any_window_on_any_grid(seed: int, device: str) -> None:
    draw = random.Random(seed)
    geometry = None
    while geometry is None:
        kernel, stride, side = draw.choice([3, 3, 5, 5, 7, 7, 2, 4]), draw.choice([1, 1, 2, 3]), draw.randint(1, 18)
        padding, dilation = draw.randint(0, kernel // 2), draw.choice([1, 1, 1, 2])
        window = Window((kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
        grid = draw.randint(1, 2), draw.randint(1, max(2, 12 // side))
        patches = ActivePatches((torch.rand(2, *grid) < draw.random()).to(device))
        with contextlib.suppress(ValueError):  # a map that is not a whole number of pixels per patch
            geometry = Geometry.of(patches, side, window)
    channels = draw.choice([1, 2, 8, 33, 66])
    features = torch.randn(geometry.rows_in, channels).to(device)
    weight, grad = torch.randn(channels, 1, kernel, kernel), torch.randn(geometry.rows_out, channels)
    weight, grad = weight.to(device), grad.to(device)
    for function, first, second in [
        ("forward", (features, weight), (None, geometry)),
        ("grad_input", (grad, weight), (geometry,)),
        ("grad_weight", (grad, features), (geometry, weight)),
    ]:
        ours = getattr(cuda, function)(*first, *second)
        exact = [t.double() if torch.is_tensor(t) else t for t in (*first, *second)]
        expected = getattr(reference, function)(*exact)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda m: f"{geometry}: {m}")


@pytest.mark.parametrize("name", ["7x7", "7x7 side 1", "7x7 side 8", "3x3 stride 2", "5x5 dilated"])
def test_the_order_of_threads_does_not_matter(name: str, on_shim, some_patches: ActivePatches) -> None:
    (features, weight, bias), geometry = inputs_for(name, torch.bfloat16, some_patches)
    grad = torch.randn(geometry.rows_out, features.shape[1]).bfloat16()
    on_shim.same_in_every_order(
        lambda: (
            cuda.forward(features, weight, bias, geometry),
            cuda.grad_input(grad, weight, geometry),
            cuda.grad_weight(grad, features, geometry, weight),
        )
    )
    assert on_shim.state.barriers > 0


def test_without_a_bias_and_from_strided_tensors(device: str) -> None:
    patches = ActivePatches(torch.tensor([[[1, 0], [1, 1]]]).bool().to(device))
    geometry = Geometry.of(patches, 4, Window((3, 3), padding=(1, 1)))
    features = torch.randn(16, geometry.rows_in).to(device).t()
    weight = torch.randn(16, 1, 3, 6).to(device)[..., ::2]
    negative = torch._neg_view(features)
    out = cuda.forward(features, weight, None, geometry)
    expected = reference.forward(features.double(), weight.double(), None, geometry)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cuda.forward(negative, weight, None, geometry), -out, rtol=0, atol=0)
    grad = cuda.grad_weight(features, features, geometry, weight)
    assert grad.is_contiguous() and grad.shape == weight.shape
    expected = reference.grad_weight(features.double(), features.double(), geometry, weight.double())
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["7x7", "7x7 side 1", "7x7 side 8", "5x5 dilated", "3x3 stride 2", "3x3 side 3"])
def test_nothing_is_written_or_read_outside(name: str, on_shim, some_patches: ActivePatches) -> None:
    """Margins of NaN lie around all tensors: they stay as they are, and none gets into a result."""
    tensors, geometry = inputs_for(name, torch.float32, some_patches)
    channels, module = tensors[0].shape[1], on_shim.module
    inputs = []
    for tensor in (*tensors, torch.randn(geometry.rows_out, channels)):
        inputs.append(guarded(tensor.shape, tensor.dtype)[0].copy_(tensor))
    features, weight = inputs[:2]
    forward, back = native_cuda.geometry_args(geometry), native_cuda.geometry_args(geometry, True)
    parts = module.depthwise_parts(0, *forward, channels)
    out, out_whole = guarded((geometry.rows_out, channels), torch.float32)
    grad_in, grad_in_whole = guarded(features.shape, torch.float32)
    sums, sums_whole = guarded((parts, geometry.window.taps, channels), torch.float32)
    grad_w, grad_w_whole = guarded(weight.shape, torch.float32)
    f, w, b, g, o, gi, s, gw = (t.data_ptr() for t in (*inputs, out, grad_in, sums, grad_w))
    module.depthwise_gather(0, 0, 0, *forward, False, channels, f, w, b, o)
    module.depthwise_gather(0, 0, 0, *back, True, channels, g, w, 0, gi)
    module.depthwise_grad_weight(0, 0, 0, *forward, channels, f, g, s, parts, gw)
    assert out_whole() and grad_in_whole() and sums_whole() and grad_w_whole()
    for result in (out, grad_in, sums, grad_w):
        assert result.isfinite().all()


def test_runs_on_the_callers_device_and_stream(on_shim, some_patches: ActivePatches) -> None:
    (features, weight, bias), geometry = inputs_for("7x7", torch.float32, some_patches)
    for call, launches in [
        (lambda: cuda.forward(features, weight, bias, geometry), 1),
        (lambda: cuda.grad_input(features, weight, geometry), 1),
        (lambda: cuda.grad_weight(features, features, geometry, weight), 2),
    ]:
        before = on_shim.state.launches
        call()
        assert on_shim.state.launches == before + launches
        assert (on_shim.state.launch_device, on_shim.state.stream, on_shim.state.device) == (1, 77, 0)


@pytest.mark.parametrize("name", ["7x7", "5x5 dilated"])
def test_a_failed_launch_names_its_kernel(name: str, on_shim, some_patches: ActivePatches) -> None:
    (features, weight, bias), geometry = inputs_for(name, torch.float32, some_patches)
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="depthwise_gather: cudaErrorInvalidConfiguration: "):
        cuda.forward(features, weight, bias, geometry)
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="depthwise_grad_weight: cudaErrorInvalidConfiguration: "):
        cuda.grad_weight(features, features, geometry, weight)
    maps = native_cuda.geometry_args(geometry)
    with pytest.raises(RuntimeError, match="depthwise_gather: cudaErrorInvalidDevice: "):
        on_shim.module.depthwise_gather(7, 0, 0, *maps, False, 1, 64, 64, 0, 64)
    with pytest.raises(ValueError, match="depthwise_gather: type 3"):
        on_shim.module.depthwise_gather(0, 0, 3, *maps, False, 1, 64, 64, 0, 64)
    with pytest.raises(ValueError, match="depthwise_gather: a number of the geometry"):
        on_shim.module.depthwise_gather(0, 0, 0, *maps[:2], (3, 3, 0, 1, 1, 1, 1, 1), False, 1, 64, 64, 0, 64)
    with pytest.raises(ValueError, match="depthwise_grad_weight: the number of parts"):
        on_shim.module.depthwise_grad_weight(0, 0, 0, *maps, 1, 64, 64, 64, 1000, 64)
    assert on_shim.state.device == 0


def test_arguments_are_refused_before_native_code(on_shim, some_patches: ActivePatches) -> None:
    (features, weight, bias), geometry = inputs_for("7x7", torch.float32, some_patches)
    before = on_shim.state.launches
    for call, error, message in [
        (lambda: cuda.forward(features[1:], weight, bias, geometry), ValueError, "features must have shape"),
        (lambda: cuda.forward(features[0], weight, bias, geometry), ValueError, "features must have shape"),
        (lambda: cuda.forward(features, weight[1:], bias, geometry), ValueError, "weight must have shape"),
        (lambda: cuda.forward(features, weight, bias[1:], geometry), ValueError, "bias must have shape"),
        (lambda: cuda.forward(features, weight, bias.half(), geometry), TypeError, "bias is torch.float16"),
        (lambda: cuda.forward(features.half(), weight, None, geometry), TypeError, "features is torch.float16 and"),
        (lambda: cuda.forward(features.double(), weight.double(), None, geometry), TypeError, "torch.float64"),
        (lambda: cuda.grad_input(features[1:], weight, geometry), ValueError, "grad must have shape"),
        (lambda: cuda.grad_weight(features[1:], features, geometry, weight), ValueError, "grad must have shape"),
        (lambda: cuda.grad_weight(features, features[1:], geometry, weight), ValueError, "features must have shape"),
    ]:
        with pytest.raises(error, match=f"depthwise: {message}" if message != "torch.float64" else message):
            call()
    assert on_shim.state.launches == before
    assert "float64" in cuda.unsupported(features.double(), weight.double(), geometry)
    assert "one dtype" in cuda.unsupported(features, weight.half(), geometry)
    many = Geometry(some_patches, some_patches, Window((1, 1)), (2**16 * 2, 2**14 * 3), (2**16 * 2, 2**14 * 3))
    assert "count up to" in cuda.unsupported(features, weight, many)


def test_tensors_on_the_cpu_are_refused() -> None:
    patches = ActivePatches(torch.ones(1, 1, 1, dtype=torch.bool))
    geometry = Geometry.of(patches, 4, Window((3, 3), padding=(1, 1)))
    features, weight = torch.zeros(16, 2), torch.zeros(2, 1, 3, 3)
    with pytest.raises(ValueError, match=r"depthwise: .* one GPU; features is on cpu"):
        cuda.forward(features, weight, None, geometry)
    with pytest.raises(ValueError, match=r"depthwise: .* one GPU; grad is on cpu"):
        cuda.grad_input(features, weight, geometry)
    with pytest.raises(ValueError, match=r"depthwise_grad_weight: .* one GPU; grad is on cpu"):
        cuda.grad_weight(features, features, geometry, weight)
