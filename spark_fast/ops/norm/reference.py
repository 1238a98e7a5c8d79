"""The formulas, in at least float32. Without `mean` and `rstd` of a batch norm these are 0 and 1, in every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}


def batch_statistics(features, running_mean, running_var, momentum, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal deviation (C,); the running statistics are updated in place."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(momentum * x.mean(0))
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(momentum * x.var(0, correction=1))
    return x.mean(0), 1 / torch.sqrt(x.var(0, correction=0) + eps)


def batch_apply(features, residual, mean, rstd, weight, bias, activation, dtype=None) -> torch.Tensor:
    mean, rstd = _statistics(features, mean, rstd)
    y = _affine((features.to(mean.dtype) - mean) * rstd, weight, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual).to(dtype or features.dtype)


def batch_norm_backward(
    grad, features, residual, mean, rstd, weight, bias, training, activation
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the features, the weight, the bias, and the residual if there is one."""
    mean, rstd = _statistics(features, mean, rstd)
    x, grad = features.to(mean.dtype), grad.to(mean.dtype)
    normal = (x - mean) * rstd
    y = _affine(normal, weight, bias)
    grad = _before_activation(grad, y if residual is None else y + residual, activation)
    grad_weight, grad_bias = (grad * normal).sum(0), grad.sum(0)
    inner = grad if weight is None else grad * weight
    if training:
        inner = inner - inner.mean(0) - normal * (inner * normal).mean(0)
    return (inner * rstd).to(features.dtype), grad_weight, grad_bias, None if residual is None else grad


def layer_norm_forward(features, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, and the mean and the reciprocal deviation (N, 1) that they were normalised with."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    mean, rstd = x.mean(1, keepdim=True), 1 / torch.sqrt(x.var(1, correction=0, keepdim=True) + eps)
    return _affine((x - mean) * rstd, weight, bias).to(features.dtype), mean, rstd


def layer_norm_backward(grad, features, weight, bias, mean, rstd) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the features, the weight and the bias."""
    x, grad = features.to(mean.dtype), grad.to(mean.dtype)
    normal = (x - mean) * rstd
    inner = grad if weight is None else grad * weight
    grad_input = (inner - inner.mean(1, keepdim=True) - normal * (inner * normal).mean(1, keepdim=True)) * rstd
    return grad_input.to(features.dtype), (grad * normal).sum(0), grad.sum(0)


def _statistics(features, mean, rstd) -> tuple[torch.Tensor, torch.Tensor]:
    if mean is None:
        mean = features.new_zeros(features.shape[1], dtype=torch.promote_types(features.dtype, torch.float32))
    return mean, torch.ones_like(mean) if rstd is None else rstd


def _affine(x, weight, bias) -> torch.Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _before_activation(grad, y, activation) -> torch.Tensor:
    """The gradient of the activation's input `y`, as in PyTorch: none at the kinks of a ReLU, and at NaN all of it."""
    if activation == "silu":
        s = torch.sigmoid(y)
        return grad * (s + y * s * (1 - s))
    stops = torch.zeros_like(y, dtype=torch.bool)
    if activation is not None:
        stops |= y <= 0
    if activation == "relu6":
        stops |= y >= 6
    return torch.where(stops, 0, grad)
