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

BATCH_NORM = "bool training, float momentum, float eps, str? activation, str backend"
MAPS = f"SymInt side, str backend, str copies, {graph.TABLES}"  # dense maps of patches


def batch_norm(features, running_mean, running_var, weight, bias, training, momentum, eps, activation) -> torch.Tensor:
    settings = (training, momentum, eps, activation, backend.forced_in_graphs("norm"))
    out, _, _, *updated = batch_norm_forward(features, weight, bias, running_mean, running_var, *settings)
    if training:
        _update((running_mean, running_var), updated)
    return out


def _update(running, updated) -> None:
    with torch.no_grad():
        for given, new in zip(running, updated, strict=True):
            if given is not None:
                given.copy_(new)


def layer_norm(features, weight, bias, eps: float) -> torch.Tensor:
    return layer_norm_forward(features, weight, bias, eps, backend.forced_in_graphs("norm"))[0]


def _statistics(features, *size: int) -> torch.Tensor:
    return features.new_empty(size, dtype=torch.promote_types(features.dtype, torch.float32))


def _kept(features) -> torch.Tensor:
    """The result's strides are those of packed rows."""
    return features.new_empty(features.shape)


def _batch_norm_outputs(features, weight, bias, running_mean, running_var, training, *_):
    return _kept(features), *_batch_statistics(features, running_mean, running_var, training)


def _batch_statistics(features, running_mean, running_var, training):
    updated = (
        running.new_empty(running.shape if training else (0,)) if running is not None else features.new_empty(0)
        for running in (running_mean, running_var)
    )
    return *(_statistics(features, features.shape[1]) for _ in "12"), *updated


@graph.op(
    "norm_batch_norm_forward(Tensor features, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    f"{BATCH_NORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_batch_norm_outputs,
)
def batch_norm_forward(features, weight, bias, running_mean, running_var, training, momentum, eps, activation, forced):
    run, running = graph.run("norm", forced, features), _writable((running_mean, running_var), training)
    out, *statistics = run.batch_norm_forward(
        features.contiguous(), weight, bias, *running, training, momentum, eps, activation
    )
    return out.contiguous(), *_wide(features, statistics), *_updated(features, running, training)


def _writable(running, training) -> list[torch.Tensor | None]:
    """The statistics, or in training copies that the backend may change."""
    if not training:
        return list(running)
    return [None if r is None else r.clone(memory_format=torch.contiguous_format) for r in running]


def _updated(features, running, training) -> list[torch.Tensor]:
    return [features.new_empty(0) if r is None else (r if training else r.new_empty(0)) for r in running]


def _wide(features, statistics) -> list[torch.Tensor]:
    return [s.to(torch.promote_types(features.dtype, torch.float32)) for s in statistics]


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
    return [_apart(g.to(t.dtype).contiguous()) for g, t, w in zip(grads, inputs, wanted, strict=True) if w]


def _apart(t: torch.Tensor) -> torch.Tensor:
    """`t`, copied if it is a part of something larger: results of a registered op may not share memory."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


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
    return out.contiguous(), *(s.view(-1, 1) for s in _wide(features, statistics))


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


def batch_norm_scatter(
    features, running_mean, running_var, weight, bias, fill, training, momentum, eps, patches, side
) -> torch.Tensor:
    running, where = (running_mean, running_var), _where(patches, side)
    out, _, _, *updated = batch_scatter_forward(features, weight, bias, fill, *running, training, momentum, eps, *where)
    if training:
        _update(running, updated)
    return out


def layer_norm_scatter(features, weight, bias, fill, eps: float, patches: ActivePatches, side: int) -> torch.Tensor:
    return layer_scatter_forward(features, weight, bias, fill, eps, *_where(patches, side))[0]


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


def _batch_scatter_outputs(features, weight, bias, fill, running_mean, running_var, training, momentum, eps, *where):
    return _empty_maps(features, *where), *_batch_statistics(features, running_mean, running_var, training)


@graph.op(
    "norm_batch_scatter_forward(Tensor features, Tensor? weight, Tensor? bias, Tensor? fill, Tensor? running_mean, "
    f"Tensor? running_var, bool training, float momentum, float eps, {MAPS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_batch_scatter_outputs,
)
def batch_scatter_forward(features, weight, bias, fill, running_mean, running_var, training, momentum, eps, *where):
    maps, running = _maps(features, *where), _writable((running_mean, running_var), training)
    settings = (weight, bias, *running, training, momentum, eps, None)
    out, *statistics = maps.forward("batch_norm", features.contiguous(), fill, *settings)
    return out, *_wide(features, statistics), *_updated(features, running, training)


@graph.op(
    "norm_batch_scatter_backward(Tensor grad, Tensor features, Tensor? weight, Tensor? bias, bool[] wanted, "
    f"Tensor mean, Tensor rstd, bool training, {MAPS}) -> Tensor[]",
    fake=lambda grad, features, weight, bias, wanted, *_: _wanted_grads(grad, features, weight, bias, wanted),
)
def batch_scatter_backward(grad, features, weight, bias, wanted, mean, rstd, training, *where):
    saved = (features.contiguous(), weight, bias, mean, rstd, training, None)
    return _cast(_maps(features, *where).backward("batch_norm", grad, *saved), (features, weight, bias), wanted)


def _keep_batch_scatter(ctx, inputs, output) -> None:
    features, weight, bias, _, _, _, ctx.training, _, _, *ctx.where, coords, grid_to_patch, ctx.per_image = inputs
    ctx.save_for_backward(features, weight, bias, output[1], output[2], coords, grid_to_patch)


def _batch_scatter_backward(ctx, grad, *_):
    *saved, coords, grid_to_patch = ctx.saved_tensors
    where = (*ctx.where, coords, grid_to_patch, ctx.per_image)
    return *_scatter_grads(ctx, batch_scatter_backward, grad, saved, (ctx.training,), where), *[None] * 11


def _scatter_grads(ctx, backward, grad, saved, settings, where) -> tuple[torch.Tensor | None, ...]:
    """Of features, weight, bias and fill."""
    features, weight, bias, mean, rstd = saved
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(backward(grad, features, weight, bias, wanted, mean, rstd, *settings, *where))
    fill = grad_fill(grad, *where[2:]) if ctx.needs_input_grad[3] else None
    return *(next(found) if w else None for w in wanted), fill


batch_scatter_forward.register_autograd(_batch_scatter_backward, setup_context=_keep_batch_scatter)


def _layer_scatter_outputs(features, weight, bias, fill, eps, *where):
    return _empty_maps(features, *where), *(_statistics(features, features.shape[0], 1) for _ in "12")


@graph.op(
    "norm_layer_scatter_forward(Tensor features, Tensor? weight, Tensor? bias, Tensor? fill, float eps, "
    f"{MAPS}) -> (Tensor, Tensor, Tensor)",
    fake=_layer_scatter_outputs,
)
def layer_scatter_forward(features, weight, bias, fill, eps, *where):
    maps = _maps(features, *where)
    out, *statistics = maps.forward("layer_norm", features.contiguous(), fill, weight, bias, eps)
    return out, *(s.view(-1, 1) for s in _wide(features, statistics))


@graph.op(
    "norm_layer_scatter_backward(Tensor grad, Tensor features, Tensor? weight, Tensor? bias, bool[] wanted, "
    f"Tensor mean, Tensor rstd, {MAPS}) -> Tensor[]",
    fake=lambda grad, features, weight, bias, wanted, *_: _wanted_grads(grad, features, weight, bias, wanted),
)
def layer_scatter_backward(grad, features, weight, bias, wanted, mean, rstd, *where):
    saved = (features.contiguous(), weight, bias, mean, rstd)
    return _cast(_maps(features, *where).backward("layer_norm", grad, *saved), (features, weight, bias), wanted)


def _keep_layer_scatter(ctx, inputs, output) -> None:
    features, weight, bias, _, _, *ctx.where, coords, grid_to_patch, ctx.per_image = inputs
    ctx.save_for_backward(features, weight, bias, output[1], output[2], coords, grid_to_patch)


def _layer_scatter_backward(ctx, grad, *_):
    *saved, coords, grid_to_patch = ctx.saved_tensors
    where = (*ctx.where, coords, grid_to_patch, ctx.per_image)
    return *_scatter_grads(ctx, layer_scatter_backward, grad, saved, (), where), *[None] * 7


layer_scatter_forward.register_autograd(_layer_scatter_backward, setup_context=_keep_layer_scatter)
