"""Between dense maps and packed rows: gather the active patches, scatter them back around a fill value."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.densify import graph
from spark_fast.patches import ActivePatches


def gather_patches(images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """The active patches of dense maps as rows. Masked pixels are not read, so that they may hold anything.

    Args:
        images: (B, C, gh * side, gw * side), any strides.
        patches: the active patches.

    Returns:
        rows (P * side * side, C), patch-major, row-major inside a patch.

    Raises:
        TypeError, ValueError: images do not fit the patches; the message says how.
    """
    check_images(images, patches)
    if torch.compiler.is_compiling():
        return graph.gather_patches(images, patches)
    return GatherPatches.apply(images, patches, backend.select("densify", images.device, images.dtype, images, patches))


def scatter_patches(
    features: torch.Tensor, patches: ActivePatches, side: int, fill: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense maps with `features` at the active pixels and `fill` (default 0) at the others (paper, equation 2).

    Args:
        features: (P * side * side, C) rows.
        fill: (C,), the features' dtype, differentiable; None for zeros.

    Returns:
        (B, C, gh * side, gw * side), channels-last in memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    checks.check_rows("scatter_patches", features, patches, side)
    checks.check_like("scatter_patches", "fill", fill, features, (features.shape[1],))
    if torch.compiler.is_compiling():
        return graph.scatter_patches(features, patches, side, fill)
    run = backend.select("densify", features.device, features.dtype, features, patches, side)
    return ScatterPatches.apply(features, fill, patches, side, run)


def check_images(images: torch.Tensor, patches: ActivePatches) -> None:
    checks.check_patches("gather_patches", patches)
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a tensor; got {type(images).__name__}")
    (gh, gw), shape = patches.grid, tuple(images.shape)
    if images.dim() != 4:
        raise ValueError(f"images must be (batch, channels, height, width); got shape {shape}")
    if shape[0] != patches.batch:
        raise ValueError(f"images and active must hold the same number of images; got {shape[0]} and {patches.batch}")
    height, width = shape[2:]
    if height % gh or width % gw or height // gh != width // gw or height < gh:
        raise ValueError(
            f"images of {height}x{width} pixels cannot be cut into {gh}x{gw} square patches: height / {gh} and "
            f"width / {gw} must be the same whole number. Resize the images, or use another patch_size"
        )
    if images.device != patches.device:
        raise ValueError(f"images are on {images.device}, active on {patches.device}; move one with .to()")


def trial(run, tensor: torch.Tensor, patches: ActivePatches, side: int | None = None) -> None:
    """Gathers images, or scatters rows if there is a side, for `backend.select` to measure."""
    if side is None:
        run.gather(tensor, patches)
    else:
        run.scatter(tensor, patches, side, None)


class GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, patches: ActivePatches, run):
        ctx.patches, ctx.run, ctx.side = patches, run, images.shape[2] // patches.grid[0]
        return run.gather(images, patches)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.run.scatter(grad.contiguous(), ctx.patches, ctx.side, None), None, None


class ScatterPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, fill, patches: ActivePatches, side: int, run):
        ctx.patches, ctx.run = patches, run
        return run.scatter(features, patches, side, fill)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_fill = None
        if ctx.needs_input_grad[1]:
            grad_fill = ctx.run.sum_masked(grad, ctx.patches)
        return ctx.run.gather(grad, ctx.patches), grad_fill, None, None, None
