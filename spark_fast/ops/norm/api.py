"""Batch norm over the active pixels of a batch, and layer norm over the channels of each active pixel."""

from __future__ import annotations

import torch
import torch.distributed as dist

from spark_fast.ops import backend


def batch_norm(
    features: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Batch norm with statistics over the rows, that is over the active pixels of the batch only (paper, section 3.1).

    Args:
        features: (N, C) rows.
        running_mean, running_var, weight, bias: (C,) or None, as in torch.nn.functional.batch_norm; in training the
            running statistics are updated in place, the variance unbiased.

    Returns:
        (N, C).

    Raises:
        ValueError: training with fewer than two active pixels, or evaluating without running statistics.
    """
    _check(features)
    if training and features.shape[0] < 2:
        raise ValueError(
            f"batch_norm: training needs at least 2 active pixels in the batch; got {features.shape[0]}. "
            "Use more images, a lower mask_ratio or model.eval()"
        )
    if not training and (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: running_mean and running_var must be given together")
    if not training and running_mean is None:
        raise ValueError("batch_norm: training=False needs running_mean and running_var")
    run = backend.select("norm", features.device)
    return run.batch_norm(features, running_mean, running_var, weight, bias, training, momentum, eps)


def layer_norm(
    features: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Layer norm over the channels of each active pixel: features (N, C), weight and bias (C,) or None -> (N, C)."""
    _check(features)
    return backend.select("norm", features.device).layer_norm(features, weight, bias, eps)


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

    _check(features)
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


def _check(features: torch.Tensor) -> None:
    if features.dim() != 2:
        raise ValueError(f"features must be (rows, channels); got shape {tuple(features.shape)}")
