"""The reconstruction loss as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.patches import ActivePatches


def patch_loss(prediction, images, patches: ActivePatches) -> torch.Tensor:
    """Of prediction and images in one dtype; without a gradient of the images."""
    return forward(prediction, images, backend.forced_in_graphs("patch_loss"), *graph.tables(patches))


@graph.op(
    f"patch_loss_forward(Tensor prediction, Tensor images, str backend, {graph.TABLES}) -> Tensor",
    fake=lambda prediction, *_: prediction.new_empty(()),
)
def forward(prediction, images, forced, *tables):
    patches = ActivePatches.from_tables(*tables)
    return graph.run("patch_loss", forced, prediction, images, patches).forward(prediction, images, patches)


@graph.op(
    f"patch_loss_grad(Tensor grad, Tensor prediction, Tensor images, str backend, {graph.TABLES}) -> Tensor",
    fake=lambda grad, prediction, *_: torch.empty_like(prediction),
)
def grad_prediction(grad, prediction, images, forced, *tables):
    patches, out = ActivePatches.from_tables(*tables), torch.empty_like(prediction)
    if patches.count == patches.grid_to_patch.numel():
        return out.zero_()
    run = graph.run("patch_loss", forced, prediction, images, patches)
    if hasattr(run, "grad_prediction"):
        return out.copy_(run.grad_prediction(grad, prediction, images, patches))
    # The backend's loss is an autograd.Function, which is recorded here too; PyTorch's own functions are not.
    with torch.enable_grad():
        prediction = prediction.detach().requires_grad_()
        loss = run.forward(prediction, images, patches)
    (found,) = torch.autograd.grad(loss, prediction, grad)
    return found if found.stride() == out.stride() else out.copy_(found)


def _keep(ctx, inputs, output) -> None:
    prediction, images, ctx.forced, coords, grid_to_patch, ctx.per_image = inputs
    ctx.save_for_backward(prediction, images, coords, grid_to_patch)


def _backward(ctx, grad):
    prediction, images, *tables = ctx.saved_tensors
    rest = (ctx.forced, *tables, ctx.per_image)
    return grad_prediction(grad, prediction, images, *rest), None, *(None for _ in rest)


forward.register_autograd(_backward, setup_context=_keep)
