"""The norms as torch.compile sees them (`spark_fast.ops.graph`).

A registered op with a gradient may not change its arguments. The running statistics therefore come out as new tensors,
and are copied in the graph.
"""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.ops.densify.graph import grad_fill
from spark_fast.ops.norm.maps import Maps
from spark_fast.patches import ActivePatches

MAPS = f"SymInt side, str backend, str copies, {graph.TABLES}"  # dense maps of patches


def batch_statistics(features, running_mean, running_var, momentum, eps) -> tuple[torch.Tensor, torch.Tensor]:
    running = (running_mean, running_var)
    mean, rstd, *updated = statistics(features, *running, momentum, eps, backend.forced_in_graphs("norm"))
    with torch.no_grad():
        for given, new in zip(running, updated, strict=True):
            if given is not None:
                given.copy_(new)
    return mean, rstd


def batch_apply(features, residual, mean, rstd, weight, bias, training, activation) -> torch.Tensor:
    settings = (training, activation, backend.forced_in_graphs("norm"))
    return batch_forward(features, residual, mean, rstd, weight, bias, *settings)


def layer_norm(features, weight, bias, eps: float) -> torch.Tensor:
    return layer_norm_forward(features, weight, bias, eps, backend.forced_in_graphs("norm"))[0]


def _statistics(features, *size: int) -> torch.Tensor:
    return features.new_empty(size, dtype=torch.promote_types(features.dtype, torch.float32))


def _kept(features, *_) -> torch.Tensor:
    """The result's strides are those of packed rows."""
    return features.new_empty(features.shape)


def _found_statistics(features, running_mean, running_var, *_):
    updated = (
        features.new_empty(0) if running is None else running.new_empty(running.shape)
        for running in (running_mean, running_var)
    )
    return *(_statistics(features, features.shape[1]) for _ in "12"), *updated


@graph.op(
    "norm_batch_statistics(Tensor features, Tensor? running_mean, Tensor? running_var, float momentum, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_found_statistics,
)
def statistics(features, running_mean, running_var, momentum, eps, forced):
    """Mean, 1 / deviation, and the running statistics brought up to date."""
    run = graph.run("norm", forced, features)
    running = [
        None if r is None else r.clone(memory_format=torch.contiguous_format) for r in (running_mean, running_var)
    ]
    found = run.batch_statistics(features.contiguous(), *running, momentum, eps)
    return *_wide(features, found), *(features.new_empty(0) if r is None else r for r in running)


def _wide(features, statistics) -> list[torch.Tensor]:
    return [s.to(torch.promote_types(features.dtype, torch.float32)) for s in statistics]


@graph.op(
    "norm_batch_apply(Tensor features, Tensor? residual, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "bool training, str? activation, str backend) -> Tensor",
    fake=_kept,
)
def batch_forward(features, residual, mean, rstd, weight, bias, training, activation, forced):
    run = graph.run("norm", forced, features)
    return run.batch_apply(features.contiguous(), residual, mean, rstd, weight, bias, activation).contiguous()


def _wanted_grads(inputs, wanted):
    return [t.new_empty(t.shape) for t, w in zip(inputs, wanted, strict=True) if w]


@graph.op(
    "norm_batch_norm_backward(Tensor grad, Tensor features, Tensor? residual, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, bool[] wanted, bool training, str? activation, str backend) -> Tensor[]",
    fake=lambda grad, features, residual, mean, rstd, weight, bias, wanted, *_: _wanted_grads(
        (features, weight, bias, residual), wanted
    ),
)
def batch_norm_backward(grad, features, residual, mean, rstd, weight, bias, wanted, training, activation, forced):
    """Of features, weight, bias and residual, those that are wanted."""
    run = graph.run("norm", forced, features)
    grads = run.batch_norm_backward(
        grad.contiguous(), features.contiguous(), residual, mean, rstd, weight, bias, training, activation
    )
    return _cast(grads, (features, weight, bias, residual), wanted)


def _cast(grads, inputs, wanted) -> list[torch.Tensor]:
    """The gradients that were asked for, in the dtypes of their inputs."""
    return [_apart(g.to(t.dtype).contiguous()) for g, t, w in zip(grads, inputs, wanted, strict=True) if w]


def _apart(t: torch.Tensor) -> torch.Tensor:
    """`t`, copied if it is a part of something larger: results of a registered op may not share memory."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def _keep_batch_norm(ctx, inputs, output) -> None:
    features, residual, mean, rstd, weight, bias, *ctx.settings = inputs
    activation = ctx.settings[1]
    ctx.save_for_backward(features, residual if activation else None, mean, rstd, weight, bias)


def _batch_norm_backward(ctx, grad):
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    masked = saved[1] is not None  # else the residual's gradient is `grad`
    wanted = [needed[0], needed[4], needed[5], needed[1] and masked]
    found = iter(batch_norm_backward(grad, *saved, wanted, *ctx.settings))
    of_features, of_weight, of_bias, of_residual = (next(found) if w else None for w in wanted)
    if needed[1] and not masked:
        of_residual = grad
    return of_features, of_residual, None, None, of_weight, of_bias, None, None, None


batch_forward.register_autograd(_batch_norm_backward, setup_context=_keep_batch_norm)


def _layer_norm_outputs(features, *_):
    return _kept(features), *(_statistics(features, features.shape[0], 1) for _ in "12")


@graph.op(
    "norm_layer_norm_forward(Tensor features, Tensor? weight, Tensor? bias, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_layer_norm_outputs,
)
def layer_norm_forward(features, weight, bias, eps, forced):
    out, *statistics = graph.run("norm", forced, features).layer_norm_forward(features.contiguous(), weight, bias, eps)
    return out.contiguous(), *(s.view(-1, 1) for s in _wide(features, statistics))


@graph.op(
    "norm_layer_norm_backward(Tensor grad, Tensor features, Tensor? weight, Tensor? bias, bool[] wanted, Tensor mean, "
    "Tensor rstd, str backend) -> Tensor[]",
    fake=lambda grad, features, weight, bias, wanted, *_: _wanted_grads((features, weight, bias), wanted),
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


def batch_norm_scatter(
    features, fill, mean, rstd, weight, bias, training: bool, patches: ActivePatches, side: int
) -> torch.Tensor:
    return batch_scatter_forward(features, fill, mean, rstd, weight, bias, training, *_where(patches, side))


def layer_norm_scatter(features, fill, weight, bias, eps: float, patches: ActivePatches, side: int) -> torch.Tensor:
    return layer_scatter_forward(features, fill, weight, bias, eps, *_where(patches, side))[0]


def _where(patches: ActivePatches, side: int) -> tuple:
    """The arguments MAPS."""
    return side, backend.forced_in_graphs("norm"), backend.forced_in_graphs("densify"), *graph.tables(patches)


def _maps(features, side, forced, forced_copies, *tables) -> Maps:
    """What MAPS say, when an op runs."""
    patches = ActivePatches.from_tables(*tables)
    copies = graph.run("densify", forced_copies, features, patches, side)
    return Maps(patches, side, graph.run("norm", forced, features), copies)


def _empty_maps(features, side, forced, forced_copies, coords, grid_to_patch, per_image) -> torch.Tensor:
    batch, gh, gw = grid_to_patch.shape
    return features.new_empty(batch, gh * side, gw * side, features.shape[1]).permute(0, 3, 1, 2)


@graph.op(
    "norm_batch_scatter_forward(Tensor features, Tensor? fill, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    f"bool training, {MAPS}) -> Tensor",
    fake=lambda features, fill, mean, rstd, weight, bias, training, *where: _empty_maps(features, *where),
)
def batch_scatter_forward(features, fill, mean, rstd, weight, bias, training, *where):
    return _maps(features, *where).batch_norm(features.contiguous(), fill, mean, rstd, weight, bias)


@graph.op(
    "norm_batch_scatter_backward(Tensor grad, Tensor features, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    f"bool[] wanted, bool training, {MAPS}) -> Tensor[]",
    fake=lambda grad, features, mean, rstd, weight, bias, wanted, *_: _wanted_grads((features, weight, bias), wanted),
)
def batch_scatter_backward(grad, features, mean, rstd, weight, bias, wanted, training, *where):
    maps = _maps(features, *where)
    grads = maps.batch_norm_backward(grad, features.contiguous(), mean, rstd, weight, bias, training)
    return _cast(grads, (features, weight, bias), wanted)


def _keep_batch_scatter(ctx, inputs, output) -> None:
    features, _, mean, rstd, weight, bias, ctx.training, *where = inputs
    _keep_scatter(ctx, (features, mean, rstd, weight, bias), where)


def _keep_scatter(ctx, tensors, where) -> None:
    *ctx.where, coords, grid_to_patch, ctx.per_image = where
    ctx.save_for_backward(*tensors, coords, grid_to_patch)


def _kept_for_scatter(ctx) -> tuple[list[torch.Tensor | None], tuple]:
    """The tensors given to _keep_scatter, and the arguments MAPS."""
    *saved, coords, grid_to_patch = ctx.saved_tensors
    return saved, (*ctx.where, coords, grid_to_patch, ctx.per_image)


def _batch_scatter_backward(ctx, grad):
    (saved, where), needed = _kept_for_scatter(ctx), ctx.needs_input_grad
    wanted = [needed[0], needed[4], needed[5]]
    found = iter(batch_scatter_backward(grad, *saved, wanted, ctx.training, *where))
    of_features, of_weight, of_bias = (next(found) if w else None for w in wanted)
    fill = grad_fill(grad, *where[2:]) if needed[1] else None
    return of_features, fill, None, None, of_weight, of_bias, *[None] * 7


batch_scatter_forward.register_autograd(_batch_scatter_backward, setup_context=_keep_batch_scatter)


def _layer_scatter_outputs(features, fill, weight, bias, eps, *where):
    return _empty_maps(features, *where), *(_statistics(features, features.shape[0], 1) for _ in "12")


@graph.op(
    "norm_layer_scatter_forward(Tensor features, Tensor? fill, Tensor? weight, Tensor? bias, float eps, "
    f"{MAPS}) -> (Tensor, Tensor, Tensor)",
    fake=_layer_scatter_outputs,
)
def layer_scatter_forward(features, fill, weight, bias, eps, *where):
    out, *statistics = _maps(features, *where).layer_norm(features.contiguous(), fill, weight, bias, eps)
    return out, *(s.view(-1, 1) for s in _wide(features, statistics))


@graph.op(
    "norm_layer_scatter_backward(Tensor grad, Tensor features, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    f"bool[] wanted, {MAPS}) -> Tensor[]",
    fake=lambda grad, features, mean, rstd, weight, bias, wanted, *_: _wanted_grads((features, weight, bias), wanted),
)
def layer_scatter_backward(grad, features, mean, rstd, weight, bias, wanted, *where):
    grads = _maps(features, *where).layer_norm_backward(grad, features.contiguous(), mean, rstd, weight, bias)
    return _cast(grads, (features, weight, bias), wanted)


def _keep_layer_scatter(ctx, inputs, output) -> None:
    features, _, weight, bias, _, *where = inputs
    _keep_scatter(ctx, (features, *output[1:], weight, bias), where)


def _layer_scatter_backward(ctx, grad, *_):
    (saved, where), needed = _kept_for_scatter(ctx), ctx.needs_input_grad
    wanted = [needed[0], needed[2], needed[3]]
    found = iter(layer_scatter_backward(grad, *saved, wanted, *where))
    of_features, of_weight, of_bias = (next(found) if w else None for w in wanted)
    fill = grad_fill(grad, *where[2:]) if needed[1] else None
    return of_features, fill, of_weight, of_bias, *[None] * 7


layer_scatter_forward.register_autograd(_layer_scatter_backward, setup_context=_keep_layer_scatter)
