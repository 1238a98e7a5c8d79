"""csrc/patch_loss_cuda.cu against the float64 reference: on the CPU by csrc/cuda_shim, on a GPU where there is one."""

from __future__ import annotations

import mmap

import pytest
import torch
from cuda_shim import MASKS, guarded
from exactness import assert_as_exact, value_and_grads

from spark_fast.ops import native_cuda
from spark_fast.ops.patch_loss import cuda, reference
from spark_fast.patches import ActivePatches

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("prediction_type", "images_type"), [(p, i) for p in FLOATS for i in FLOATS], ids=str)
@pytest.mark.parametrize(("channels", "side"), [(1, 4), (3, 16), (5, 3), (70, 2)])
def test_equals_the_formula(channels, side, prediction_type, images_type, patches: ActivePatches) -> None:
    gh, gw = patches.grid
    shape = (patches.batch, channels, gh * side, gw * side)
    prediction = torch.randn(shape).to(patches.device, prediction_type)
    images = (torch.randn(shape) * 2 + 3).to(patches.device, images_type)
    assert cuda.unsupported(prediction, images, patches) is None
    ours, (our_grad,) = value_and_grads(lambda t: cuda.forward(t, images, patches), prediction)
    theirs, (their_grad,) = value_and_grads(lambda t: reference.forward(t.float(), images.float(), patches), prediction)
    oracle, (grad,) = value_and_grads(lambda t: reference.forward(t, images.double(), patches), prediction.double())
    assert ours.dtype == torch.float32 and our_grad.dtype == prediction_type
    assert_as_exact(ours, theirs, oracle, "loss", prediction.numel())
    assert_as_exact(our_grad, their_grad, grad, "grad prediction", side * side * channels)
    visible = patches.active.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None].expand(shape)
    assert (our_grad[visible] == 0).all()


def some(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, ActivePatches]:
    return (
        torch.randn(batch, 3, 8, 12),
        torch.randn(batch, 3, 8, 12),
        ActivePatches(torch.tensor(MASKS["equal"]).bool()),
    )


def test_strides_are_not_misread(device: str) -> None:
    prediction, images, patches = some()
    prediction, images, patches = prediction.to(device), images.to(device), ActivePatches(patches.active.to(device))
    exact = prediction.double().requires_grad_()
    loss = reference.forward(exact, images.double(), patches)
    (grad,) = torch.autograd.grad(loss, exact)
    last = prediction.contiguous(memory_format=torch.channels_last)
    for p, i in [
        (last, images[..., None].expand(2, 3, 8, 12, 2)[..., 0]),
        (prediction.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), images.mT.contiguous().mT),
        (torch.nn.functional.pad(prediction, (1, 2, 3, 1))[:, :, 3:-1, 1:-2], torch._neg_view(-images)),
    ]:
        leaf = p.detach().requires_grad_()
        again = cuda.forward(leaf, i, patches)
        (ours,) = torch.autograd.grad(again, leaf)
        torch.testing.assert_close(again.double(), loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(ours.double(), grad, rtol=1e-5, atol=1e-8)
        assert ours.is_contiguous(memory_format=torch.channels_last) == (p is last)


def test_an_expanded_prediction_and_a_scaled_loss(device: str) -> None:
    _, images, patches = some()
    images, patches = images.to(device), ActivePatches(patches.active.to(device))
    value = torch.randn(2, 3, 1, 1).to(device).requires_grad_()
    (ours,) = torch.autograd.grad(cuda.forward(value.expand(2, 3, 8, 12), images, patches) * -3, value)
    (theirs,) = torch.autograd.grad(reference.forward(value.expand(2, 3, 8, 12), images, patches) * -3, value)
    torch.testing.assert_close(ours, theirs)


def test_a_patch_of_one_value_has_no_deviation(device: str) -> None:
    patches = ActivePatches(torch.tensor([[[1, 0]]]).bool().to(device))
    assert cuda.forward(torch.zeros(1, 1, 1, 2, device=device), torch.ones(1, 1, 1, 2, device=device), patches).isnan()


def test_the_order_of_threads_does_not_matter(on_shim) -> None:
    prediction, images, patches = some()
    prediction.requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        loss = cuda.forward(prediction, images, patches)
        return loss.detach(), *torch.autograd.grad(loss, prediction)

    on_shim.same_in_every_order(run)


def test_offsets_beyond_32_bits(on_shim) -> None:
    far = 2**31 + 8  # elements from one image to the next; only the touched pages take memory
    _, dense, patches = some()
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 512)), dtype=torch.int16).view(torch.bfloat16)
    images = memory.as_strided((2, 3, 8, 12), (far, 96, 12, 1))
    images.copy_(dense)
    prediction = torch.randn(2, 3, 8, 12)
    ours = cuda.forward(prediction, images, patches)
    assert torch.equal(ours, cuda.forward(prediction, dense.bfloat16(), patches))


def test_nothing_is_written_outside_the_output(on_shim) -> None:
    prediction, images, patches = some()
    masked = patches.complement()
    error, error_whole = guarded((masked.count,), torch.float32)
    mean, mean_whole = guarded((masked.count,), torch.float32)
    inverse, inverse_whole = guarded((masked.count,), torch.float32)
    loss, loss_whole = guarded((1,), torch.float32)
    grad, grad_whole = guarded(prediction.shape, torch.float32)
    common = (0, 0, native_cuda.map_args(masked, (4, 4)), 3, images.stride(), prediction.stride(), images.data_ptr(),
              prediction.data_ptr())  # fmt: skip
    run = on_shim.module
    run.patch_loss_forward(0, 0, *common, 1e-6, *(t.data_ptr() for t in (error, mean, inverse, loss)))
    run.patch_loss_grad(0, 0, *common, *(t.data_ptr() for t in (mean, inverse, loss)), False, grad.data_ptr())
    assert error_whole() and mean_whole() and inverse_whole() and loss_whole() and grad_whole()
    assert grad.isfinite().all()


def test_a_failed_launch_names_its_kernel_and_runs_where_it_should(on_shim) -> None:
    prediction, images, patches = some()
    prediction.requires_grad_()
    before = on_shim.state.launches
    loss = cuda.forward(prediction, images, patches)
    torch.autograd.grad(loss, prediction, retain_graph=True)
    assert on_shim.state.launches == before + 3
    assert (on_shim.state.launch_device, on_shim.state.stream, on_shim.state.device) == (1, 77, 0)
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="patch_loss_grad: cudaErrorInvalidConfiguration: "):
        torch.autograd.grad(loss, prediction)
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="patch_loss_forward: cudaErrorInvalidConfiguration: "):
        cuda.forward(prediction, images, patches)


def test_arguments_are_refused_before_native_code(on_shim) -> None:
    prediction, images, patches = some()
    before = on_shim.state.launches
    for call, error, message in [
        (lambda: cuda.forward(prediction[:1], images, patches), ValueError, "prediction must have"),
        (lambda: cuda.forward(prediction, images[:1], patches), ValueError, "images must be"),
        (lambda: cuda.forward(prediction, images[..., :11], patches), ValueError, "images must be"),
        (lambda: cuda.forward(prediction, images[:, :0], patches), ValueError, "images must be"),
        (lambda: cuda.forward(prediction.double(), images, patches), TypeError, "prediction is torch.float64"),
        (lambda: cuda.forward(prediction, images.double(), patches), TypeError, "images is torch.float64"),
        (lambda: cuda.forward(prediction, images.requires_grad_(), patches), TypeError, "images need a gradient"),
    ]:
        with pytest.raises(error, match=f"patch_loss: {message}"):
            call()
    assert on_shim.state.launches == before


def test_tensors_on_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_loss: .* one GPU; prediction is on cpu"):
        cuda.forward(*some())
