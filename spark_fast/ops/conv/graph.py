"""The convolution as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph


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
    return graph.run("conv", forced, features).forward(features, weight, bias, geometry, groups).contiguous()


@graph.op(
    f"conv_grad_input(Tensor grad, Tensor weight, int groups, str backend, {graph.GEOMETRY}) -> Tensor",
    fake=lambda grad, weight, groups, forced, *where: grad.new_empty(graph.rows_in(*where), weight.shape[1] * groups),
)
def grad_input(grad, weight, groups, forced, *where):
    geometry = graph.geometry(grad.device, *where)
    return graph.run("conv", forced, grad).grad_input(grad.contiguous(), weight, geometry, groups).contiguous()


@graph.op(
    "conv_grad_weight(Tensor grad, Tensor features, Tensor weight, int groups, str backend, "
    f"{graph.GEOMETRY}) -> Tensor",
    fake=lambda grad, features, weight, *_: weight.new_empty(weight.shape),
)
def grad_weight(grad, features, weight, groups, forced, *where):
    geometry = graph.geometry(grad.device, *where)
    run = graph.run("conv", forced, grad)
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
