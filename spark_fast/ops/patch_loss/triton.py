"""Triton kernels of the patch loss: one program per patch, which reads it where it lies, whatever the strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from spark_fast.ops import tuning
from spark_fast.ops.patch_loss import configs
from spark_fast.ops.patch_loss.api import EPS
from spark_fast.ops.triton_launch import launch, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.patches import ActivePatches

READS_HALF = True


def unsupported(prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches) -> str | None:
    for tensor in (prediction, images):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{tensor.dtype} runs on PyTorch's library"
    return None


def forward(prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """The loss, a float32 scalar, of prediction and images (B, C, H, W) in any strides; no gradient of the images."""
    return PatchLossFunction.apply(prediction.resolve_neg(), images.resolve_neg(), patches)


class PatchLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, images, patches: ActivePatches):
        ctx.save_for_backward(prediction, images)
        ctx.patches = patches
        masked = patches.complement()

        def run(config):
            error = prediction.new_empty(masked.count, dtype=torch.float32)
            launch(
                patch_errors, (masked.count,), prediction, images, error, masked.coords, *prediction.stride(),
                *images.stride(), EPS, **_constants(prediction, masked, config),
            )  # fmt: skip
            return error

        # The sum of no patch is 0.
        return _tuned("patch_loss.errors", prediction, images, masked, run).sum() / max(masked.count, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad_prediction(grad, *ctx.saved_tensors, ctx.patches), None, None


def grad_prediction(
    grad: torch.Tensor, prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches
) -> torch.Tensor:
    """The gradient of the prediction (B, C, H, W), from that of the loss, which stays on its device."""
    masked = patches.complement()

    def run(config):
        out = torch.empty_like(prediction)
        constants = _constants(prediction, masked, config)
        values = constants["CHANNELS"] * constants["SIDE"] ** 2 * masked.count
        launch(
            patch_gradients, (masked.active.numel(),), grad, prediction, images, out, masked.grid_to_patch,
            *prediction.stride(), *images.stride(), *out.stride(), *masked.grid, EPS, 2.0 / max(values, 1), **constants,
        )  # fmt: skip
        return out

    return _tuned("patch_loss.gradient", prediction, images, masked, run)


def _constants(prediction, masked: ActivePatches, config) -> dict[str, int]:
    channels, side = prediction.shape[1], prediction.shape[2] // masked.grid[0]
    block = min(config["BLOCK"], triton.next_power_of_2(max(channels * side * side, 1)))
    return {"CHANNELS": channels, "SIDE": side, "BLOCK": block, "num_warps": config["num_warps"]}


def _tuned(kernel: str, prediction, images, masked: ActivePatches, run):
    case = (prediction.dtype, images.dtype, prediction.shape[1], prediction.shape[2] // masked.grid[0])
    return tuning.run(kernel, case, masked.count, configs.PATCH, configs.PATCH[0], run, prediction.device)


@triton.jit
def _values(
    corner, start, stride_c, stride_y, stride_x, CHANNELS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """(BLOCK,) addresses of a patch's values from `start` on, by channel, line and column, and which of them exist."""
    at = start + tl.arange(0, BLOCK)
    channel, y, x = at // (SIDE * SIDE), at // SIDE % SIDE, at % SIDE
    offset = channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return corner + offset, at < CHANNELS * SIDE * SIDE


@triton.jit
def _statistics(
    corner, stride_c, stride_y, stride_x, eps, CHANNELS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean and sqrt(variance + eps) of a patch, the variance unbiased. A patch that fits BLOCK is read once."""
    values: tl.constexpr = CHANNELS * SIDE * SIDE
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, values, BLOCK):
        at, exists = _values(corner, start, stride_c, stride_y, stride_x, CHANNELS, SIDE, BLOCK)
        sums += tl.load(at, mask=exists, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / values
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, values, BLOCK):
        at, exists = _values(corner, start, stride_c, stride_y, stride_x, CHANNELS, SIDE, BLOCK)
        distance = tl.where(exists, tl.load(at, mask=exists, other=0.0).to(tl.float32) - mean, 0.0)
        squares += distance * distance
    return mean, tl.sqrt(tl.sum(squares, 0) / (values - 1) + eps)


@triton.jit
def patch_errors(
    prediction,
    images,
    error,
    coords,
    prediction_b,
    prediction_c,
    prediction_y,
    prediction_x,
    images_b,
    images_c,
    images_y,
    images_x,
    eps,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """error (M,): mean squared distance of the prediction from the normalised pixels, of each patch at coords (M, 3).

    prediction and images (B, C, H, W) by their strides. Grid: (M,).
    """
    patch = tl.program_id(0)
    image = tl.load(coords + 3 * patch).to(tl.int64)
    y = tl.load(coords + 3 * patch + 1).to(tl.int64) * SIDE
    x = tl.load(coords + 3 * patch + 2).to(tl.int64) * SIDE
    source = images + image * images_b + y * images_y + x * images_x
    guess = prediction + image * prediction_b + y * prediction_y + x * prediction_x
    mean, root = _statistics(source, images_c, images_y, images_x, eps, CHANNELS, SIDE, BLOCK)
    values: tl.constexpr = CHANNELS * SIDE * SIDE
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, values, BLOCK):
        at, exists = _values(source, start, images_c, images_y, images_x, CHANNELS, SIDE, BLOCK)
        target = (tl.load(at, mask=exists, other=0.0).to(tl.float32) - mean) / root
        at, exists = _values(guess, start, prediction_c, prediction_y, prediction_x, CHANNELS, SIDE, BLOCK)
        distance = tl.where(exists, tl.load(at, mask=exists, other=0.0).to(tl.float32) - target, 0.0)
        sums += distance * distance
    tl.store(error + patch, tl.sum(sums, 0) / values)


@triton.jit
def patch_gradients(
    grad,
    prediction,
    images,
    out,
    grid_to_patch,
    prediction_b,
    prediction_c,
    prediction_y,
    prediction_x,
    images_b,
    images_c,
    images_y,
    images_x,
    out_b,
    out_c,
    out_y,
    out_x,
    grid_h,
    grid_w,
    eps,
    scale,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = grad * scale * (prediction - normalised pixels) where grid_to_patch (B, grid_h, grid_w) has one, else 0.

    grad is one number; prediction, images and out (B, C, H, W) by their strides. Grid: (B * grid_h * grid_w,).
    """
    cell = tl.program_id(0)
    image = (cell // (grid_h * grid_w)).to(tl.int64)
    y = (cell // grid_w % grid_h).to(tl.int64) * SIDE
    x = (cell % grid_w).to(tl.int64) * SIDE
    into = out + image * out_b + y * out_y + x * out_x
    values: tl.constexpr = CHANNELS * SIDE * SIDE
    if tl.load(grid_to_patch + cell) < 0:
        for start in range(0, values, BLOCK):
            at, exists = _values(into, start, out_c, out_y, out_x, CHANNELS, SIDE, BLOCK)
            tl.store(at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=exists)
    else:
        source = images + image * images_b + y * images_y + x * images_x
        guess = prediction + image * prediction_b + y * prediction_y + x * prediction_x
        mean, root = _statistics(source, images_c, images_y, images_x, eps, CHANNELS, SIDE, BLOCK)
        factor = tl.load(grad).to(tl.float32) * scale
        for start in range(0, values, BLOCK):
            at, exists = _values(source, start, images_c, images_y, images_x, CHANNELS, SIDE, BLOCK)
            target = (tl.load(at, mask=exists, other=0.0).to(tl.float32) - mean) / root
            at, exists = _values(guess, start, prediction_c, prediction_y, prediction_x, CHANNELS, SIDE, BLOCK)
            distance = tl.load(at, mask=exists, other=0.0).to(tl.float32) - target
            at, exists = _values(into, start, out_c, out_y, out_x, CHANNELS, SIDE, BLOCK)
            tl.store(at, (distance * factor).to(out.dtype.element_ty), mask=exists)
