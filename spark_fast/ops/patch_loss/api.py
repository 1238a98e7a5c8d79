"""The reconstruction loss on masked patches."""

from __future__ import annotations

import torch

from spark_fast.ops import backend
from spark_fast.ops.densify.api import check_images
from spark_fast.ops.patch_loss import graph
from spark_fast.patches import ActivePatches

EPS = 1e-6  # added to the variance of a patch


def normalize_patches(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x - mean) / sqrt(var + 1e-6) over the last dimension, var unbiased; and the mean and the root (..., 1)."""
    mean = patches.mean(-1, keepdim=True)
    root = (patches.var(-1, keepdim=True) + EPS).sqrt()
    return (patches - mean) / root, mean, root


def patch_loss(prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches) -> torch.Tensor:
    """Mean squared error against the per-patch normalised pixels, over the masked patches (paper, section 3.3).

    Args:
        prediction: (B, C, H, W).
        images: (B, C, H, W), the same device; the sums are kept in at least float32.
        patches: the *active* patches; the loss covers the others.

    Returns:
        scalar, at least float32; 0 if no patch is masked.

    Raises:
        TypeError, ValueError: shapes or devices do not fit.
    """
    if prediction.shape != images.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and images {tuple(images.shape)} must have the same shape"
        )
    from spark_fast.ops.patch_loss import library  # which imports this module

    check_images(images, patches)
    if torch.compiler.is_compiling():
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        # A gradient of the images too is that of the formula, which a graph can hold.
        formula = images.requires_grad and torch.is_grad_enabled()
        return (library.forward if formula else graph.patch_loss)(prediction.to(dtype), images.to(dtype), patches)
    run = backend.select("patch_loss", prediction.device, prediction.dtype, prediction, images, patches)
    if images.requires_grad and torch.is_grad_enabled() and not run.__name__.endswith((".library", ".reference")):
        run = library  # the kernels take the images as the target only, and have no gradient of them
    if not hasattr(run, "READS_HALF"):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        prediction, images = prediction.to(dtype), images.to(dtype)
    return run.forward(prediction, images, patches)


def trial(run, prediction: torch.Tensor, images: torch.Tensor, patches: ActivePatches) -> None:
    """All that a training step asks of a backend, for `backend.select` to measure."""
    with torch.enable_grad():
        leaf = prediction.detach().requires_grad_()
        torch.autograd.grad(run.forward(leaf, images.detach(), patches), leaf)
