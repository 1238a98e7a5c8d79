"""Launcher of csrc/patch_loss_cuda.cu: the patches are read where they lie, whatever the strides; float32, float16 and
bfloat16, sums in float32."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import native_cuda
from spark_fast.ops.native_cuda import TYPES, address, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.patch_loss.api import EPS
from spark_fast.patches import ActivePatches

READS_HALF = True


def unsupported(prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches) -> str | None:
    """Why these kernels cannot run this case, or None. The two dtypes may differ."""
    if images.requires_grad and torch.is_grad_enabled():
        return "images need a gradient; the CUDA kernels give that of the prediction only"
    if images.shape[1:].numel() >= native_cuda.MOST - 256:
        return f"images of {images.shape[1:].numel()} values; the CUDA kernels count them in 32 bits"
    cells = patches.active.numel()
    if cells > native_cuda.MOST:
        return f"{cells} patches; the CUDA kernels count up to {native_cuda.MOST}"
    return native_cuda.dtype_problem(prediction=prediction) or native_cuda.dtype_problem(images=images)


def forward(prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """The loss, a float32 scalar, over all but `patches`; prediction and images (B, C, gh * side, gw * side).

    Raises TypeError or ValueError where an argument does not fit, RuntimeError naming the kernel where CUDA fails.
    """
    (gh, gw), shape = patches.grid, tuple(images.shape)
    side = shape[2] // gh if len(shape) == 4 else 0
    if side < 1 or shape[0] != patches.batch or shape[1] < 1 or shape[2:] != (gh * side, gw * side):
        raise ValueError(
            f"patch_loss: images must be (batch, channels, height, width) with batch {patches.batch}, cut into "
            f"{gh}x{gw} square patches; got shape {shape}"
        )
    if tuple(prediction.shape) != shape:
        raise ValueError(f"patch_loss: prediction must have the images' shape {shape}; got {tuple(prediction.shape)}")
    problem = unsupported(prediction, images, patches)
    if problem:
        raise TypeError(f"patch_loss: {problem}")
    masked = patches.complement()
    if not masked.count:
        return prediction.float().sum() * 0
    return PatchLossFunction.apply(prediction, images, masked)


class PatchLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, images, masked: ActivePatches):
        device, stream = native_cuda.queue("patch_loss", prediction=prediction, images=images, patches=masked.coords)
        prediction, images = prediction.resolve_neg(), images.resolve_neg()
        error, mean, inverse = prediction.new_empty(3, masked.count, dtype=torch.float32)
        loss = prediction.new_empty((), dtype=torch.float32)
        native_cuda.module().patch_loss_forward(
            device, stream, *_tensors(prediction, images, masked), EPS, *map(address, (error, mean, inverse, loss))
        )
        ctx.save_for_backward(prediction, images, mean, inverse)
        ctx.masked = masked
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        prediction, images, mean, inverse = ctx.saved_tensors
        device, stream = native_cuda.queue("patch_loss", grad=grad, prediction=prediction)
        last = prediction.is_contiguous(memory_format=torch.channels_last) and not prediction.is_contiguous()
        out = torch.empty_like(prediction, memory_format=torch.channels_last if last else torch.contiguous_format)
        grad = native_cuda.plain(grad)
        native_cuda.module().patch_loss_grad(
            device, stream, *_tensors(prediction, images, ctx.masked), *map(address, (mean, inverse, grad)), last,
            address(out),
        )  # fmt: skip
        return out, None, None


def _tensors(prediction, images, masked: ActivePatches) -> tuple:
    side = images.shape[2] // masked.grid[0]
    return (
        TYPES[images.dtype], TYPES[prediction.dtype], native_cuda.map_args(masked, (side, side)), images.shape[1],
        images.stride(), prediction.stride(), address(images), address(prediction),
    )  # fmt: skip
