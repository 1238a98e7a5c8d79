"""The norms as torch.compile sees them (`spark_fast.ops.graph`).

A registered op with a gradient may not change its arguments. The running statistics therefore come out as new tensors,
and are copied in the graph.
"""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph

BATCH_NORM = "bool training, float momentum, float eps, str? activation, str backend"


def batch_norm(features, running_mean, running_var, weight, bias, training, momentum, eps, activation) -> torch.Tensor:
    settings = (training, momentum, eps, activation, backend.forced_in_graphs("norm"))
    out, _, _, *updated = batch_norm_forward(features, weight, bias, running_mean, running_var, *settings)
    if training:
        with torch.no_grad():
            for given, new in zip((running_mean, running_var), updated, strict=True):
                if given is not None:
                    given.copy_(new)
    return out


def layer_norm(features, weight, bias, eps: float) -> torch.Tensor:
    return layer_norm_forward(features, weight, bias, eps, backend.forced_in_graphs("norm"))[0]


def _statistics(features, *size: int) -> torch.Tensor:
    return features.new_empty(size, dtype=torch.promote_types(features.dtype, torch.float32))


def _kept(features) -> torch.Tensor:
    """The result's strides are those of packed rows."""
    return features.new_empty(features.shape)


def _batch_norm_outputs(features, weight, bias, running_mean, running_var, training, *_):
    updated = (
        running.new_empty(running.shape if training else (0,)) if running is not None else features.new_empty(0)
        for running in (running_mean, running_var)
    )
    return _kept(features), *(_statistics(features, features.shape[1]) for _ in "12"), *updated


@graph.op(
    "norm_batch_norm_forward(Tensor features, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    f"{BATCH_NORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_batch_norm_outputs,
)
def batch_norm_forward(features, weight, bias, running_mean, running_var, training, momentum, eps, activation, forced):
    run = graph.run("norm", forced, features)
    running = [running_mean, running_var]
    if training:
        running = [None if r is None else r.clone(memory_format=torch.contiguous_format) for r in running]
    out, *statistics = run.batch_norm_forward(
        features.contiguous(), weight, bias, *running, training, momentum, eps, activation
    )
    dtype = torch.promote_types(features.dtype, torch.float32)
    updated = [features.new_empty(0) if r is None else (r if training else r.new_empty(0)) for r in running]
    return out.contiguous(), *(s.to(dtype) for s in statistics), *updated


def _wanted_grads(grad, features, weight, bias, wanted):
    like = (features, weight, bias)
    return [t.new_empty(t.shape) for t, w in zip(like, wanted, strict=True) if w]


@graph.op(
    "norm_batch_norm_backward(Tensor grad, Tensor features, Tensor? weight, Tensor? bias, bool[] wanted, Tensor mean, "
    "Tensor rstd, bool training, str? activation, str backend) -> Tensor[]",
    fake=lambda grad, features, weight, bias, wanted, *_: _wanted_grads(grad, features, weight, bias, wanted),
)
def batch_norm_backward(grad, features, weight, bias, wanted, mean, rstd, training, activation, forced):
    run = graph.run("norm", forced, features)
    grads = run.batch_norm_backward(
        grad.contiguous(), features.contiguous(), weight, bias, mean, rstd, training, activation
    )
    return _cast(grads, (features, weight, bias), wanted)


def _cast(grads, inputs, wanted) -> list[torch.Tensor]:
    """The gradients that were asked for, in the dtypes of their inputs."""
    return [g.to(t.dtype).contiguous() for g, t, w in zip(grads, inputs, wanted, strict=True) if w]


def _keep_batch_norm(ctx, inputs, output) -> None:
    features, weight, bias, _, _, training, _, _, activation, forced = inputs
    ctx.save_for_backward(features, weight, bias, output[1], output[2])
    ctx.settings = training, activation, forced


def _batch_norm_backward(ctx, grad, *_):
    features, weight, bias, mean, rstd = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(batch_norm_backward(grad, features, weight, bias, wanted, mean, rstd, *ctx.settings))
    return *(next(found) if w else None for w in wanted), *[None] * 7


batch_norm_forward.register_autograd(_batch_norm_backward, setup_context=_keep_batch_norm)


def _layer_norm_outputs(features, *_):
    return _kept(features), *(_statistics(features, features.shape[0], 1) for _ in "12")


@graph.op(
    "norm_layer_norm_forward(Tensor features, Tensor? weight, Tensor? bias, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_layer_norm_outputs,
)
def layer_norm_forward(features, weight, bias, eps, forced):
    out, *statistics = graph.run("norm", forced, features).layer_norm_forward(features.contiguous(), weight, bias, eps)
    dtype = torch.promote_types(features.dtype, torch.float32)
    return out.contiguous(), *(s.view(-1, 1).to(dtype) for s in statistics)


@graph.op(
    "norm_layer_norm_backward(Tensor grad, Tensor features, Tensor? weight, Tensor? bias, bool[] wanted, Tensor mean, "
    "Tensor rstd, str backend) -> Tensor[]",
    fake=lambda grad, features, weight, bias, wanted, *_: _wanted_grads(grad, features, weight, bias, wanted),
)
def layer_norm_backward(grad, features, weight, bias, wanted, mean, rstd, forced):
    run = graph.run("norm", forced, features)
    grads = run.layer_norm_backward(grad.contiguous(), features.contiguous(), weight, bias, mean, rstd)
    return _cast(grads, (features, weight, bias), wanted)


def _keep_layer_norm(ctx, inputs, output) -> None:
    features, weight, bias, _, ctx.forced = inputs
    ctx.save_for_backward(features, weight, bias, output[1], output[2])


def _layer_norm_backward(ctx, grad, *_):
    features, weight, bias, mean, rstd = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(layer_norm_backward(grad, features, weight, bias, wanted, mean, rstd, ctx.forced))
    return *(next(found) if w else None for w in wanted), None, None


layer_norm_forward.register_autograd(_layer_norm_backward, setup_context=_keep_layer_norm)
