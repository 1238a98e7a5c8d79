"""The depthwise convolution as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.ops.window import Geometry


def depthwise_conv2d(features, weight, bias, geometry: Geometry) -> torch.Tensor:
    return forward(features, weight, bias, backend.forced_in_graphs("depthwise"), *graph.window_tables(geometry))


@graph.op(
    f"depthwise_forward(Tensor features, Tensor weight, Tensor? bias, str backend, {graph.GEOMETRY}) -> Tensor",
    fake=lambda features, weight, bias, forced, *where: features.new_empty(graph.rows_out(*where), weight.shape[0]),
)
def forward(features, weight, bias, forced, *where):
    geometry = graph.geometry(features.device, *where)
    run = graph.run("depthwise", forced, features, weight, geometry)
    return run.forward(features, weight, bias, geometry).contiguous()


@graph.op(
    f"depthwise_grad_input(Tensor grad, Tensor weight, str backend, {graph.GEOMETRY}) -> Tensor",
    fake=lambda grad, weight, forced, *where: grad.new_empty(graph.rows_in(*where), grad.shape[1]),
)
def grad_input(grad, weight, forced, *where):
    geometry = graph.geometry(grad.device, *where)
    features = graph.input_rows(grad, grad.shape[1], where)
    run = graph.run("depthwise", forced, features, weight, geometry)
    return run.grad_input(grad.contiguous(), weight, geometry).contiguous()


@graph.op(
    f"depthwise_grad_weight(Tensor grad, Tensor features, Tensor weight, str backend, {graph.GEOMETRY}) -> Tensor",
    fake=lambda grad, features, weight, *_: weight.new_empty(weight.shape),
)
def grad_weight(grad, features, weight, forced, *where):
    geometry = graph.geometry(grad.device, *where)
    run = graph.run("depthwise", forced, features, weight, geometry)
    return run.grad_weight(grad.contiguous(), features, geometry, weight).contiguous()


def _keep(ctx, inputs, output) -> None:
    features, weight, _, ctx.forced, coords, grid_to_patch, *ctx.where = inputs
    ctx.save_for_backward(features, weight, coords, grid_to_patch)


def _backward(ctx, grad):
    features, weight, *tables = ctx.saved_tensors
    rest, wanted = (ctx.forced, *tables, *ctx.where), ctx.needs_input_grad
    return (
        grad_input(grad, weight, *rest) if wanted[0] else None,
        grad_weight(grad, features, weight, *rest) if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
        *(None for _ in rest),
    )


forward.register_autograd(_backward, setup_context=_keep)
