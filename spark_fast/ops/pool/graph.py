"""Max pooling as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.ops.window import Geometry


def max_pool2d(features, geometry: Geometry) -> torch.Tensor:
    return forward(features, backend.forced_in_graphs("pool"), *graph.window_tables(geometry))[0]


def _outputs(features, forced, *where):
    out = features.new_empty(graph.rows_out(*where), features.shape[1])
    return out, torch.empty_like(out, dtype=torch.int16)


@graph.op(f"pool_max_forward(Tensor features, str backend, {graph.GEOMETRY}) -> (Tensor, Tensor)", fake=_outputs)
def forward(features, forced, *where):
    geometry = graph.geometry(features.device, *where)
    out, argmax = graph.run("pool", forced, features, geometry).max_forward(features, geometry)
    return out.contiguous(), argmax.contiguous()


@graph.op(
    f"pool_max_grad_input(Tensor grad, Tensor argmax, str backend, {graph.GEOMETRY}) -> Tensor",
    fake=lambda grad, argmax, forced, *where: grad.new_empty(graph.rows_in(*where), grad.shape[1]),
)
def grad_input(grad, argmax, forced, *where):
    geometry = graph.geometry(grad.device, *where)
    run = graph.run("pool", forced, graph.input_rows(grad, grad.shape[1], where), geometry)
    return run.max_grad_input(grad.contiguous(), argmax, geometry).contiguous()


def _keep(ctx, inputs, output) -> None:
    _, ctx.forced, coords, grid_to_patch, *ctx.where = inputs
    ctx.save_for_backward(output[1], coords, grid_to_patch)


def _backward(ctx, grad, _):
    argmax, *tables = ctx.saved_tensors
    rest = (ctx.forced, *tables, *ctx.where)
    return grad_input(grad, argmax, *rest), *(None for _ in rest)


forward.register_autograd(_backward, setup_context=_keep)
