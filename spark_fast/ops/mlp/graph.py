"""The MLP as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.ops.mlp.gradients import gradients, keeps


def mlp(features, weight1, bias1, weight2, bias2, wanted) -> torch.Tensor:
    return forward(features, weight1, bias1, weight2, bias2, any(wanted[:4]), backend.forced_in_graphs("mlp"))[0]


def _outputs(features, weight1, bias1, weight2, bias2, keep, forced):
    rows = features.shape[0]
    return features.new_empty(rows, weight2.shape[0]), features.new_empty(rows if keep else 0, weight1.shape[0])


@graph.op(
    "mlp_forward(Tensor features, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, bool keep, "
    "str backend) -> (Tensor, Tensor)",
    fake=_outputs,
)
def forward(features, weight1, bias1, weight2, bias2, keep, forced):
    """The second result is what goes into the GELU, without rows if it is not kept."""
    run = graph.run("mlp", forced, features)
    out, hidden = run.forward(features, weight1, bias1, weight2, bias2, keep)
    return out.contiguous(), hidden.contiguous() if keep else features.new_empty(0, weight1.shape[0])


def _wanted_grads(grad, features, hidden, weight1, weight2, wanted, forced):
    width, out = (hidden.shape[1], grad.shape[1]) if hidden is not None else (0, grad.shape[1])
    channels = features.shape[1] if features is not None else weight1.shape[1] if weight1 is not None else 0
    shapes = ((grad.shape[0], channels), (width, channels), (width,), (out, width), (out,))
    return [grad.new_empty(shape) for shape, w in zip(shapes, wanted, strict=True) if w]


@graph.op(
    "mlp_backward(Tensor grad, Tensor? features, Tensor? hidden, Tensor? weight1, Tensor? weight2, bool[] wanted, "
    "str backend) -> Tensor[]",
    fake=_wanted_grads,
)
def backward(grad, features, hidden, weight1, weight2, wanted, forced):
    """The wanted gradients of features, weight1, bias1, weight2 and bias2; the rest may be None where it is not needed
    (`gradients.keeps`)."""
    run = graph.run("mlp", forced, grad)
    found = gradients(run, grad.contiguous(), (features, hidden, weight1, weight2), wanted)
    return [g.contiguous() for g in found if g is not None]


def _keep(ctx, inputs, output) -> None:
    features, weight1, _, weight2, _, _, ctx.forced = inputs
    ctx.set_materialize_grads(False)  # of what goes into the GELU there is none
    ctx.wanted = list(ctx.needs_input_grad[:5])
    ctx.save_for_backward(*keeps(features, output[1], weight1, weight2, ctx.wanted))


def _backward(ctx, grad, _):
    wanted = ctx.wanted
    if grad is None:
        return (None,) * 7
    found = iter(backward(grad, *ctx.saved_tensors, wanted, ctx.forced))
    return *(next(found) if w else None for w in wanted), None, None


forward.register_autograd(_backward, setup_context=_keep)
