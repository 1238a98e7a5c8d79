"""Launcher of csrc/patch_loss_cpu.cpp: the patches are read where they lie, whatever the strides."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import native
from spark_fast.ops.native import address, unavailable  # noqa: F401  (unavailable: asked by ops.backend)
from spark_fast.ops.patch_loss.api import EPS
from spark_fast.patches import ActivePatches


def forward(prediction, images, patches: ActivePatches) -> torch.Tensor:
    masked = patches.complement()
    if not masked.count:
        return prediction.sum() * 0
    return PatchLossFunction.apply(prediction, images, masked)


class PatchLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, images, masked: ActivePatches):
        mean, root = prediction.new_empty(2, masked.count)
        error = torch.empty(masked.count, dtype=torch.float64)
        native.module().patch_loss_forward(
            _grid(prediction, images, masked), images.element_size(), address(images), address(prediction), EPS,
            address(error), address(mean), address(root), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(prediction, images, mean, root)
        ctx.masked = masked
        return error.mean().to(prediction.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        prediction, images, mean, root = ctx.saved_tensors
        values = prediction[0].numel() // ctx.masked.active[0].numel() * ctx.masked.count
        out = torch.zeros_like(prediction)
        if out.stride() != prediction.stride():  # a prediction with gaps or overlaps
            prediction, out = prediction.contiguous(), torch.zeros_like(prediction.contiguous())
        native.module().patch_loss_grad(
            _grid(prediction, images, ctx.masked), images.element_size(), address(images), address(prediction),
            address(mean), address(root), 2 / values, address(out), torch.get_num_threads(),
        )  # fmt: skip
        return out.mul_(grad), None, None


def _grid(prediction, images, masked: ActivePatches) -> tuple:
    native.check_plain(prediction, images, masked.coords)
    return (
        address(masked.coords), masked.count, images.shape[1], images.shape[2] // masked.grid[0], *images.stride(),
        *prediction.stride(),
    )  # fmt: skip
