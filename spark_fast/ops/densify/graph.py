"""Gather and scatter as torch.compile sees them (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.patches import ActivePatches


def gather_patches(images, patches: ActivePatches) -> torch.Tensor:
    return gather(images, backend.forced_in_graphs("densify"), *graph.tables(patches))


def scatter_patches(features, patches: ActivePatches, side: int, fill) -> torch.Tensor:
    return scatter(features, fill, side, backend.forced_in_graphs("densify"), *graph.tables(patches))


def _rows(images, forced, coords, grid_to_patch, per_image):
    side = images.shape[2] // grid_to_patch.shape[1]
    return images.new_empty(coords.shape[0] * side * side, images.shape[1])


@graph.op(f"densify_gather(Tensor images, str backend, {graph.TABLES}) -> Tensor", fake=_rows)
def gather(images, forced, *tables):
    patches = ActivePatches.from_tables(*tables)
    return graph.run("densify", forced, images, patches).gather(images, patches).contiguous()


def _images(features, fill, side, forced, coords, grid_to_patch, per_image):
    batch, gh, gw = grid_to_patch.shape
    return features.new_empty(batch, gh * side, gw * side, features.shape[1]).permute(0, 3, 1, 2)


@graph.op(
    f"densify_scatter(Tensor features, Tensor? fill, SymInt side, str backend, {graph.TABLES}) -> Tensor", fake=_images
)
def scatter(features, fill, side, forced, *tables):
    patches = ActivePatches.from_tables(*tables)
    run = graph.run("densify", forced, features, patches, side)
    return run.scatter(features.contiguous(), patches, side, fill)


@graph.op(
    f"densify_grad_fill(Tensor grad, str backend, {graph.TABLES}) -> Tensor",
    fake=lambda grad, forced, *tables: grad.new_empty(grad.shape[1]),
)
def grad_fill(grad, forced, *tables):
    patches = ActivePatches.from_tables(*tables)
    return graph.run("densify", forced, grad, patches).sum_masked(grad, patches)


def _keep_gather(ctx, inputs, output) -> None:
    images, ctx.forced, coords, grid_to_patch, ctx.per_image = inputs
    ctx.side = images.shape[2] // grid_to_patch.shape[1]
    ctx.save_for_backward(coords, grid_to_patch)


def _gather_backward(ctx, grad):
    rest = (ctx.forced, *ctx.saved_tensors, ctx.per_image)
    return scatter(grad, None, ctx.side, *rest), *(None for _ in rest)


def _keep_scatter(ctx, inputs, output) -> None:
    *_, ctx.forced, coords, grid_to_patch, ctx.per_image = inputs
    ctx.save_for_backward(coords, grid_to_patch)


def _scatter_backward(ctx, grad):
    rest = (ctx.forced, *ctx.saved_tensors, ctx.per_image)
    return (
        gather(grad, *rest) if ctx.needs_input_grad[0] else None,
        grad_fill(grad, *rest) if ctx.needs_input_grad[1] else None,
        None,
        *(None for _ in rest),
    )


gather.register_autograd(_gather_backward, setup_context=_keep_gather)
scatter.register_autograd(_scatter_backward, setup_context=_keep_scatter)
