"""csrc/pool_cuda.cu against the reference: on the CPU by csrc/cuda_shim, on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from cuda_shim import MASKS, guarded
from exactness import assert_as_exact

from spark_fast.ops import native_cuda
from spark_fast.ops.pool import cuda, reference
from spark_fast.ops.window import Geometry, Window
from spark_fast.patches import ActivePatches

# side, window, ceil_mode
POOLS = {
    "2x2": (4, Window((2, 2), (2, 2)), False),
    "3x3 stride 2": (8, Window((3, 3), (2, 2), (1, 1)), False),
    "3x3": (1, Window((3, 3), padding=(1, 1)), False),
    "ceil": (2, Window((3, 3), (2, 2)), True),
    "3x2 dilated": (6, Window((3, 2), (1, 1), (1, 1), (1, 2)), False),
}


def rows(geometry: Geometry, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Rounded, so that there are ties, also with the zeros of masked pixels; and some infinities and NaN."""
    values = torch.randn(geometry.rows_in, channels).mul(2).round().div(2)
    drawn = torch.rand(values.shape)
    values = torch.where(drawn < 0.02, torch.nan, torch.where(drawn > 0.98, -torch.inf, values))
    return values.to(geometry.source.device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 7, 68])
@pytest.mark.parametrize("name", POOLS)
def test_equals_the_reference(name: str, channels: int, dtype: torch.dtype, patches: ActivePatches) -> None:
    side, window, ceil = POOLS[name]
    geometry = Geometry.of(patches, side, window, ceil)
    features = rows(geometry, channels, dtype)
    assert cuda.unsupported(features, geometry) is None
    out, argmax = cuda.max_forward(features, geometry)
    expected, taps = reference.max_forward(features, geometry)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(argmax, taps)
    grad = torch.randn(out.shape).to(patches.device, dtype)
    ours = cuda.max_grad_input(grad, argmax, geometry)
    assert ours.dtype == dtype
    theirs, oracle = (reference.max_grad_input(g, argmax, geometry) for g in (grad, grad.double()))
    assert_as_exact(ours, theirs, oracle, "grad input", 9)


def test_a_window_wholly_outside_has_no_winner(device: str) -> None:
    patches = ActivePatches(torch.ones(1, 1, 1, dtype=torch.bool, device=device))
    geometry = Geometry(patches, patches, Window((1, 1), (1, 1), (2, 2)), (2, 2), (6, 6))
    features = torch.randn(4, 3).to(device)
    out, argmax = cuda.max_forward(features, geometry)
    expected, taps = reference.max_forward(features, geometry)
    assert torch.equal(out, expected) and torch.equal(argmax, taps) and (argmax == -1).sum() == 32 * 3
    grad = torch.randn(36, 3).to(device)
    assert torch.equal(cuda.max_grad_input(grad, argmax, geometry), reference.max_grad_input(grad, argmax, geometry))


def geometry_of(name: str = "3x3 stride 2") -> Geometry:
    side, window, ceil = POOLS[name]
    return Geometry.of(ActivePatches(torch.tensor(MASKS["equal"]).bool()), side, window, ceil)


def test_the_order_of_threads_does_not_matter(on_shim) -> None:
    geometry = geometry_of()
    features, grad = torch.randn(geometry.rows_in, 8), torch.randn(geometry.rows_out, 8)

    def run() -> tuple[torch.Tensor, ...]:
        out, argmax = cuda.max_forward(features, geometry)
        return out, argmax, cuda.max_grad_input(grad, argmax, geometry)

    on_shim.same_in_every_order(run)


def test_strided_tensors(device: str) -> None:
    geometry = Geometry.of(ActivePatches(torch.tensor(MASKS["equal"]).bool().to(device)), 4, Window((2, 2), (2, 2)))
    features = rows(geometry, 8, torch.float32)
    out, argmax = cuda.max_forward(features.t().contiguous().t(), geometry)
    assert torch.equal(argmax, cuda.max_forward(features, geometry)[1])
    grad = torch.randn(out.shape).to(device)
    expected = cuda.max_grad_input(grad, argmax, geometry)
    turned = grad.t().contiguous().t(), argmax.t().contiguous().t()
    assert torch.equal(cuda.max_grad_input(*turned, geometry), expected)


@pytest.mark.parametrize("channels", [7, 8])
def test_nothing_is_written_outside_the_output(channels: int, on_shim) -> None:
    geometry = geometry_of()
    features, grad = rows(geometry, channels, torch.float32), torch.randn(geometry.rows_out, channels)
    maps, back = native_cuda.geometry_args(geometry), native_cuda.geometry_args(geometry, True)
    out, out_whole = guarded((geometry.rows_out, channels), torch.float32)
    argmax, argmax_whole = guarded(out.shape, torch.int16)
    grad_in, grad_in_whole = guarded(features.shape, torch.float32)
    on_shim.module.max_pool_forward(0, 0, 0, *maps, channels, *(t.data_ptr() for t in (features, out, argmax)))
    on_shim.module.max_pool_grad_input(0, 0, 0, *back, channels, *(t.data_ptr() for t in (grad, argmax, grad_in)))
    assert out_whole() and argmax_whole() and grad_in_whole()
    assert grad_in.isfinite().all()


def test_a_failed_launch_names_its_kernel_and_runs_where_it_should(on_shim) -> None:
    geometry = geometry_of()
    features = rows(geometry, 3, torch.float32)
    out, argmax = cuda.max_forward(features, geometry)
    cuda.max_grad_input(out, argmax, geometry)
    assert (on_shim.state.launch_device, on_shim.state.stream, on_shim.state.device) == (1, 77, 0)
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="max_pool_forward: cudaErrorInvalidConfiguration: "):
        cuda.max_forward(features, geometry)
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="max_pool_grad_input: cudaErrorInvalidConfiguration: "):
        cuda.max_grad_input(out, argmax, geometry)


def test_arguments_are_refused_before_native_code(on_shim) -> None:
    geometry = geometry_of()
    features, grad = rows(geometry, 3, torch.float32), torch.zeros(geometry.rows_out, 3)
    argmax = torch.zeros(grad.shape, dtype=torch.int16)
    wide = Geometry(geometry.source, geometry.query, Window((256, 128)), geometry.size_in, geometry.size_out)
    before = on_shim.state.launches
    for call, error, message in [
        (lambda: cuda.max_forward(features[1:], geometry), ValueError, "features must have shape"),
        (lambda: cuda.max_forward(features[0], geometry), ValueError, "features must have shape"),
        (lambda: cuda.max_forward(features.double(), geometry), TypeError, "features is torch.float64"),
        (lambda: cuda.max_forward(features, wide), ValueError, "a kernel of 32768 elements"),
        (lambda: cuda.max_grad_input(grad[1:], argmax, geometry), ValueError, "grad must have shape"),
        (lambda: cuda.max_grad_input(grad, argmax[1:], geometry), ValueError, "argmax must be int16 of shape"),
        (lambda: cuda.max_grad_input(grad, argmax.long(), geometry), ValueError, "argmax must be int16 of shape"),
    ]:
        with pytest.raises(error, match=f"max_pool: {message}"):
            call()
    assert on_shim.state.launches == before


def test_tensors_on_the_cpu_are_refused() -> None:
    geometry = geometry_of()
    with pytest.raises(ValueError, match=r"max_pool_forward: .* one GPU; features is on cpu"):
        cuda.max_forward(rows(geometry, 3, torch.float32), geometry)
