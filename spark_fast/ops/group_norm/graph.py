"""The group norm as torch.compile sees it (`spark_fast.ops.graph`)."""

from __future__ import annotations

import torch

from spark_fast.ops import backend, graph
from spark_fast.patches import ActivePatches

WHERE = f"SymInt side, str backend, {graph.TABLES}"


def group_norm(features, weight, bias, groups: int, eps: float, patches: ActivePatches, side: int) -> torch.Tensor:
    where = (side, backend.forced_in_graphs("group_norm"), *graph.tables(patches))
    return forward(features, weight, bias, groups, eps, *where)[0]


def _outputs(features, weight, bias, groups, eps, side, forced, coords, grid_to_patch, per_image):
    dtype = torch.promote_types(features.dtype, torch.float32)
    statistics = (features.new_empty(grid_to_patch.shape[0], groups, dtype=dtype) for _ in "12")
    return features.new_empty(features.shape), *statistics


@graph.op(
    "group_norm_forward(Tensor features, Tensor? weight, Tensor? bias, SymInt groups, float eps, "
    f"{WHERE}) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def forward(features, weight, bias, groups, eps, side, forced, *tables):
    run, patches = graph.run("group_norm", forced, features), ActivePatches.from_tables(*tables)
    return run.forward(features.contiguous(), weight, bias, groups, eps, patches, side)


def _wanted(grads, inputs, wanted) -> list[torch.Tensor]:
    """Those that were asked for, in the dtypes of their inputs."""
    return [g.to(t.dtype) for g, t, w in zip(grads, inputs, wanted, strict=True) if w]


def _wanted_outputs(grad, features, weight, bias, wanted, *_):
    return [t.new_empty(t.shape) for t, w in zip((features, weight, bias), wanted, strict=True) if w]


@graph.op(
    "group_norm_backward(Tensor grad, Tensor features, Tensor? weight, Tensor? bias, bool[] wanted, Tensor mean, "
    f"Tensor rstd, {WHERE}) -> Tensor[]",
    fake=_wanted_outputs,
)
def backward(grad, features, weight, bias, wanted, mean, rstd, side, forced, *tables):
    run, patches = graph.run("group_norm", forced, features), ActivePatches.from_tables(*tables)
    grads = run.backward(grad.contiguous(), features.contiguous(), weight, mean, rstd, patches, side)
    return _wanted(grads, (features, weight, bias), wanted)


def _keep(ctx, inputs, output) -> None:
    features, weight, bias, _, _, ctx.side, ctx.forced, coords, grid_to_patch, ctx.per_image = inputs
    ctx.save_for_backward(features, weight, bias, *output[1:], coords, grid_to_patch)


def _backward(ctx, grad, *_):
    features, weight, bias, mean, rstd, *tables = ctx.saved_tensors
    wanted, where = list(ctx.needs_input_grad[:3]), (ctx.side, ctx.forced, *tables, ctx.per_image)
    found = iter(backward(grad, features, weight, bias, wanted, mean, rstd, *where))
    return *(next(found) if w else None for w in wanted), *[None] * 7


forward.register_autograd(_backward, setup_context=_keep)
