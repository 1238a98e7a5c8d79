"""Batch norm over the active pixels of a batch, and layer norm over the channels of each active pixel."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from spark_fast.ops import backend, checks
from spark_fast.ops.norm import graph

ACTIVATIONS = (None, "relu", "relu6", "silu")


def batch_norm(
    features: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Batch norm with statistics over the rows, that is over the active pixels of the batch only (paper, section 3.1).

    Args:
        features: (N, C) rows, float16/bfloat16/float32/float64. Statistics are kept in at least float32.
        running_mean, running_var, weight, bias: (C,) or None, as in torch.nn.functional.batch_norm; in training the
            running statistics are updated in place, the variance unbiased.
        activation: "relu", "relu6" or "silu" of the result, in the same pass; None for none.
        residual: (N, C), the features' dtype, added before the activation; None for none.

    Returns:
        (N, C), the features' dtype.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: training with fewer than two active pixels, evaluating without running statistics, an argument of
            another shape or device, or an unknown activation.
    """
    check_batch_norm("batch_norm", features, running_mean, running_var, weight, bias, training)
    _check_end("batch_norm", features, activation, residual)
    statistics = batch_statistics(features, running_mean, running_var, training, momentum, eps)
    return batch_apply(features, *statistics, training, weight, bias, activation, residual)


def batch_statistics(
    features: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `batch_norm`: mean and 1 / deviation (C,), in at least float32, for `batch_apply`.

    In training they are those of the rows, and the running statistics are updated; else they come from those.
    `batch_apply` gives the gradients: these are constants to autograd. Arguments and errors as for `batch_norm`.
    """
    check_batch_norm("batch_statistics", features, running_mean, running_var, None, None, training)
    if not training:
        wide = torch.promote_types(features.dtype, torch.float32)
        return running_mean.detach().to(wide, copy=True), torch.rsqrt(running_var.detach().to(wide) + eps)
    settings = (running_mean, running_var, float(momentum), float(eps))
    if torch.compiler.is_compiling():
        return graph.batch_statistics(features.detach(), *settings)
    run = backend.select("norm", features.device, features.dtype, features)
    with torch.no_grad():
        return run.batch_statistics(features.contiguous(), *settings)


def batch_apply(
    features: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    training: bool,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The second half of `batch_norm`: activation((features - mean) * rstd * weight + bias + residual).

    Args:
        mean, rstd: what `batch_statistics(features, ...)` gave, with the same `training`, which says whether the
            gradient flows through them.

    Other arguments, result and errors as for `batch_norm`.
    """
    _check("batch_apply", features)
    _check_vectors("batch_apply", features, {"mean": mean, "rstd": rstd, "weight": weight, "bias": bias})
    _check_end("batch_apply", features, activation, residual)
    if torch.compiler.is_compiling():
        return graph.batch_apply(features, residual, mean, rstd, weight, bias, bool(training), activation)
    run = backend.select("norm", features.device, features.dtype, features)
    return BatchApplyFunction.apply(features, residual, mean, rstd, weight, bias, bool(training), activation, run)


def _check_end(op: str, features, activation, residual) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{op}: activation must be one of {known}; got {activation!r}")
    checks.check_like(op, "residual", residual, features, tuple(features.shape))


def batch_norm_dense(
    images: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`batch_norm` of dense maps (B, C, H, W), whose channels-last pixels are rows; returns (B, C, H, W), channels
    last. Arguments and errors as for `batch_norm`.

    Raises:
        ValueError: `images` are not (B, C, H, W), or `residual` has another shape.
    """
    if images.dim() != 4:
        raise ValueError(f"batch_norm_dense: images must be (B, C, H, W); got shape {tuple(images.shape)}")
    if residual is not None and residual.shape != images.shape:
        raise ValueError(
            f"batch_norm_dense: residual {tuple(residual.shape)} must have the images' shape {tuple(images.shape)}"
        )
    rows = images.permute(0, 2, 3, 1)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).reshape(-1, rows.shape[3])
    out = batch_norm(
        rows.reshape(-1, rows.shape[3]), running_mean, running_var, weight, bias, training, momentum, eps, activation,
        residual,
    )  # fmt: skip
    return out.view(rows.shape).permute(0, 3, 1, 2)


def layer_scale(features: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """features * weight + residual: layer scale (Touvron et al., 2021) and the shortcut after it, in one pass.

    Args:
        features: (N, C) rows, floating point.
        weight: (C,), floating point.
        residual: (N, C), floating point, or None.

    Returns:
        (N, C), in the dtype that PyTorch promotes the arguments to.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: an argument has another shape or device than the features.
    """
    _check("layer_scale", features)
    _check_vectors("layer_scale", features, {"weight": weight})
    if residual is not None:
        if residual.dtype not in checks.FLOATS:
            raise TypeError(f"layer_scale: residual must be floating point; got {residual.dtype}")
        checks.check_like(
            "layer_scale", "residual", residual, features.new_empty((), dtype=residual.dtype), tuple(features.shape)
        )
    if torch.compiler.is_compiling():
        return features * weight if residual is None else features * weight + residual
    if torch.float64 in (weight.dtype, None if residual is None else residual.dtype):
        features = features.double()  # else the kernels compute in the type of the features
    run = backend.select("norm", features.device, features.dtype, features)
    return LayerScaleFunction.apply(features, weight, residual, run)


def layer_norm(
    features: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Layer norm over the channels of each active pixel: features (N, C), weight and bias (C,) or None -> (N, C).

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.
    """
    check_layer_norm("layer_norm", features, weight, bias)
    if torch.compiler.is_compiling():
        return graph.layer_norm(features, weight, bias, float(eps))
    run = backend.select("norm", features.device, features.dtype, features)
    return LayerNormFunction.apply(features, weight, bias, float(eps), run)


class BatchApplyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, residual, mean, rstd, weight, bias, training, activation, run):
        features = features.contiguous()
        # Neither the output nor what goes into the activation is kept: the backward computes it from the features.
        kept = residual if activation else None
        ctx.save_for_backward(features, kept, mean, rstd, weight, bias)
        ctx.settings, ctx.run = (training, activation), run
        return run.batch_apply(features, residual, mean, rstd, weight, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # checkpointing lets them be read once
        features, kept, _, _, weight, bias = saved
        of_features, of_weight, of_bias, of_residual = ctx.run.batch_norm_backward(
            grad.contiguous(), *saved, *ctx.settings
        )
        if kept is None:
            of_residual = grad  # without an activation
        grads = (of_features, of_residual, None, None, of_weight, of_bias)
        return *wanted_grads(ctx, grads, (features, grad, None, None, weight, bias)), None, None, None


class LayerScaleFunction(torch.autograd.Function):
    """A batch norm in evaluation of mean 0 and deviation 1."""

    @staticmethod
    def forward(ctx, features, weight, residual, run):
        features = features.contiguous()
        dtype = torch.promote_types(features.dtype, weight.dtype)
        dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
        ctx.save_for_backward(features, weight)
        ctx.run = run
        return run.batch_apply(features, residual, None, None, weight, None, None, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        saved = (features, None, None, None, weight, None)
        of_features, of_weight, _, _ = ctx.run.batch_norm_backward(grad.contiguous(), *saved, False, None)
        return *wanted_grads(ctx, (of_features, of_weight, grad), (features, weight, grad)), None


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, eps, run):
        features = features.contiguous()
        out, mean, rstd = run.layer_norm_forward(features, weight, bias, eps)
        ctx.save_for_backward(features, weight, bias, mean, rstd)
        ctx.run = run
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # checkpointing lets them be read once
        return *wanted_grads(ctx, ctx.run.layer_norm_backward(grad.contiguous(), *saved), saved), None, None


def wanted_grads(ctx, grads: tuple[torch.Tensor | None, ...], inputs: tuple[torch.Tensor | None, ...]) -> tuple:
    """The gradients that were asked for, in the dtypes of their inputs."""
    return tuple(
        grad.to(at.dtype) if needed else None
        for grad, at, needed in zip(grads, inputs, ctx.needs_input_grad, strict=False)
    )


def sync_batch_norm(
    features: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Training-mode batch norm with statistics over the active pixels of all ranks of `group` (paper, section 3.1).

    Ranks may hold different numbers of rows. Gradients flow through the statistics of all ranks. Works on every device
    and distributed backend. Arguments and returns as for `batch_norm`.
    """
    from torch.distributed.nn.functional import all_reduce

    _check("sync_batch_norm", features)
    rows = features.to(torch.promote_types(features.dtype, torch.float32))
    count = rows.new_full((1,), rows.shape[0])
    totals = all_reduce(torch.cat((rows.sum(0), count)), group=group)
    total = totals[-1].detach()
    torch._assert_async(total > 1, "sync_batch_norm: training needs at least 2 active pixels on all ranks together")
    mean = totals[:-1] / total
    # Two passes: the sum of squared distances does not cancel as E[x^2] - E[x]^2 does.
    var = all_reduce((rows - mean).square().sum(0), group=group) / total
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
    out = (rows - mean) * torch.rsqrt(var + eps)
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out.to(features.dtype)


def check_batch_norm(op: str, features, running_mean, running_var, weight, bias, training: bool) -> None:
    _check(op, features)
    if training and features.shape[0] < 2:
        raise ValueError(
            f"{op}: training needs at least 2 active pixels in the batch; got {features.shape[0]}. "
            "Use more images, a lower mask_ratio or model.eval()"
        )
    if not training and (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must be given together")
    if not training and running_mean is None:
        raise ValueError(f"{op}: training=False needs running_mean and running_var")
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _check_vectors(op, features, vectors)


def check_layer_norm(op: str, features, weight, bias) -> None:
    _check(op, features)
    _check_vectors(op, features, {"weight": weight, "bias": bias})


def _check(op: str, features: torch.Tensor) -> None:
    if features.dim() != 2:
        raise ValueError(f"{op}: features must be (rows, channels); got shape {tuple(features.shape)}")
    if features.dtype not in checks.FLOATS:
        raise TypeError(f"{op}: features must be floating point; got {features.dtype}")


def _check_vectors(op: str, features: torch.Tensor, vectors: dict[str, torch.Tensor | None]) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != features.shape[1:]:
            raise ValueError(
                f"{op}: {name} must have one value for each of the {features.shape[1]} channels; got shape "
                f"{tuple(vector.shape)}"
            )
        if vector.dtype not in checks.FLOATS:
            raise TypeError(f"{op}: {name} must be floating point; got {vector.dtype}")
        if vector.device != features.device:
            raise ValueError(
                f"{op}: {name} is on {vector.device}, the features are on {features.device}; move one with .to()"
            )
