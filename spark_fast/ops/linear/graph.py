"""The linear map as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph


def linear(features, weight, bias) -> torch.Tensor:
    return forward(features, weight, bias, backend.forced_in_graphs("linear"))


@graph.op(
    "linear_forward(Tensor features, Tensor weight, Tensor? bias, str backend) -> Tensor",
    fake=lambda features, weight, bias, forced: features.new_empty(features.shape[0], weight.shape[0]),
)
def forward(features, weight, bias, forced):
    return graph.run("linear", forced, features).forward(features, weight, bias).contiguous()


@graph.op(
    "linear_grad_input(Tensor grad, Tensor weight, str backend) -> Tensor",
    fake=lambda grad, weight, forced: grad.new_empty(grad.shape[0], weight.shape[1]),
)
def grad_input(grad, weight, forced):
    return graph.run("linear", forced, grad).grad_input(grad.contiguous(), weight).contiguous()


@graph.op(
    "linear_grad_weight(Tensor grad, Tensor features, str backend) -> Tensor",
    fake=lambda grad, features, forced: grad.new_empty(grad.shape[1], features.shape[1]),
)
def grad_weight(grad, features, forced):
    return graph.run("linear", forced, grad).grad_weight(grad.contiguous(), features).contiguous()


def _keep(ctx, inputs, output) -> None:
    features, weight, _, ctx.forced = inputs
    ctx.save_for_backward(features, weight)


def _backward(ctx, grad):
    features, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        grad_input(grad, weight, ctx.forced) if wanted[0] else None,
        grad_weight(grad, features, ctx.forced) if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
        None,
    )


forward.register_autograd(_backward, setup_context=_keep)
