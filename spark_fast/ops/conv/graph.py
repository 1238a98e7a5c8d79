"""The convolution as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.ops.conv import cells
from spark_fast.ops.graph import dense_tables
from spark_fast.ops.window import Geometry


def conv2d(features, weight, bias, groups: int, where: tuple) -> torch.Tensor:
    """`where`: the geometry, of `graph.window_tables` or `graph.dense_tables`."""
    return forward(features, weight, bias, groups, backend.forced_in_graphs("conv"), *where)


@graph.op(
    f"conv_forward(Tensor features, Tensor weight, Tensor? bias, int groups, str backend, {graph.GEOMETRY}) -> Tensor",
    fake=lambda features, weight, bias, groups, forced, *where: features.new_empty(
        graph.rows_out(*where), weight.shape[0]
    ),
)
def forward(features, weight, bias, groups, forced, *where):
    geometry = graph.geometry(features.device, *where)
    run = graph.run("conv", forced, features, weight, geometry, groups)
    return run.forward(features, weight, bias, geometry, groups).contiguous()


@graph.op(
    f"conv_grad_input(Tensor grad, Tensor weight, int groups, str backend, {graph.GEOMETRY}) -> Tensor",
    fake=lambda grad, weight, groups, forced, *where: grad.new_empty(graph.rows_in(*where), weight.shape[1] * groups),
)
def grad_input(grad, weight, groups, forced, *where):
    geometry = graph.geometry(grad.device, *where)
    features = graph.input_rows(grad, weight.shape[1] * groups, where)
    run = graph.run("conv", forced, features, weight, geometry, groups)
    return run.grad_input(grad.contiguous(), weight, geometry, groups).contiguous()


@graph.op(
    "conv_grad_weight(Tensor grad, Tensor features, Tensor weight, int groups, str backend, "
    f"{graph.GEOMETRY}) -> Tensor",
    fake=lambda grad, features, weight, *_: weight.new_empty(weight.shape),
)
def grad_weight(grad, features, weight, groups, forced, *where):
    geometry = graph.geometry(grad.device, *where)
    run = graph.run("conv", forced, features, weight, geometry, groups)
    return run.grad_weight(grad.contiguous(), features, geometry, groups, weight).contiguous()


def _keep(ctx, inputs, output) -> None:
    features, weight, _, ctx.groups, ctx.forced, coords, grid_to_patch, *ctx.where = inputs
    ctx.save_for_backward(features, weight, coords, grid_to_patch)


def _backward(ctx, grad):
    features, weight, *tables = ctx.saved_tensors
    rest, wanted = (ctx.groups, ctx.forced, *tables, *ctx.where), ctx.needs_input_grad
    return (
        grad_input(grad, weight, *rest) if wanted[0] else None,
        grad_weight(grad, features, weight, *rest) if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
        *(None for _ in rest),
    )


forward.register_autograd(_backward, setup_context=_keep)


def conv_transpose2d(features, weight, bias, groups: int, where: tuple) -> torch.Tensor:
    """`where`: the geometry, of `graph.window_tables`, of the convolution that is transposed."""
    return transposed(features, weight, bias, groups, backend.forced_in_graphs("conv"), *where)


@graph.op(
    "conv_transposed(Tensor features, Tensor weight, Tensor? bias, int groups, str backend, "
    f"{graph.GEOMETRY}) -> Tensor",
    fake=lambda features, weight, bias, groups, forced, *where: features.new_empty(
        graph.rows_in(*where), weight.shape[1] * groups
    ),
)
def transposed(features, weight, bias, groups, forced, *where):
    geometry = graph.geometry(features.device, *where)
    like = graph.input_rows(features, weight.shape[1] * groups, where)
    run = graph.run("conv", forced, like, weight, geometry, groups)
    out = run.grad_input(features.contiguous(), weight, geometry, groups).contiguous()
    return out if bias is None else out + bias


def _transposed_backward(ctx, grad):
    features, weight, *tables = ctx.saved_tensors
    rest, wanted = (ctx.groups, ctx.forced, *tables, *ctx.where), ctx.needs_input_grad
    return (
        forward(grad, weight, None, *rest) if wanted[0] else None,
        grad_weight(features, grad, weight, *rest) if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
        *(None for _ in rest),
    )


transposed.register_autograd(_transposed_backward, setup_context=_keep)


def has_cells(device: torch.device) -> bool:
    """Whether the backend that will run has the kernels of `up_composed`; the others have none."""
    return device.type == "cpu" and backend.forced_in_graphs("conv") in ("", "cpu")


def up_conv2d(images, up_weight, up_bias, weight) -> torch.Tensor:
    return up_composed(images, up_weight, up_bias, weight, backend.forced_in_graphs("conv"))


def _doubled(images, up_weight, up_bias, weight, forced):
    batch, _, height, width = images.shape
    return images.new_empty(batch, 2 * height, 2 * width, weight.shape[0]).permute(0, 3, 1, 2)


@graph.op(
    "conv_up_composed(Tensor images, Tensor up_weight, Tensor up_bias, Tensor weight, str backend) -> Tensor",
    fake=_doubled,
)
def up_composed(images, up_weight, up_bias, weight, forced):
    return cells.composed(images, up_weight, up_bias, weight, graph.run("conv", forced, images))


@graph.op(
    "conv_cell_grad_input(Tensor grad, Tensor kernel, SymInt[] size, str backend) -> Tensor",
    fake=lambda grad, kernel, size, forced: grad.new_empty(size[0] * size[1] * size[2], kernel.shape[1]),
)
def cell_grad_input(grad, kernel, size, forced):
    geometry = Geometry.dense(size[0], tuple(size[1:]), cells.WINDOW, grad.device)
    return graph.run("conv", forced, grad).cell_grad_input(grad, kernel, geometry)


@graph.op(
    "conv_cell_grad_weight(Tensor grad, Tensor rows, Tensor kernel, SymInt[] size, str backend) -> Tensor",
    fake=lambda grad, rows, kernel, size, forced: kernel.new_empty(kernel.shape),
)
def cell_grad_weight(grad, rows, kernel, size, forced):
    geometry = Geometry.dense(size[0], tuple(size[1:]), cells.WINDOW, grad.device)
    return graph.run("conv", forced, grad).cell_grad_weight(grad, rows, geometry, kernel)


def _keep_up(ctx, inputs, output) -> None:
    *tensors, ctx.forced = inputs
    ctx.save_for_backward(*tensors)


def _up_backward(ctx, grad):
    forced = ctx.forced

    def convolve(rows, weight, count):
        return forward(rows, weight, None, 1, forced, *dense_tables(None, count, (4, 4), cells.WIDE))

    return *cells.composed_grads(
        grad,
        ctx.saved_tensors,
        convolve,
        lambda grad_rows, kernel, size: cell_grad_input(grad_rows, kernel, size, forced),
        lambda grad_rows, rows, kernel, size: cell_grad_weight(grad_rows, rows, kernel, size, forced),
        ctx.needs_input_grad[0],
    ), None


up_composed.register_autograd(_up_backward, setup_context=_keep_up)
