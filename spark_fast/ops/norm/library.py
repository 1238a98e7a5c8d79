"""PyTorch's own kernels on the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATE = {
    None: lambda y: y,
    "relu": F.relu_,
    "relu6": lambda y: F.relu6(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
}


def batch_statistics(features, running_mean, running_var, momentum, eps) -> tuple[torch.Tensor, torch.Tensor]:
    rows = features.shape[0]
    var, mean = torch.var_mean(_wide(features), 0, correction=0)
    for running, value in ((running_mean, mean), (running_var, var * (rows / (rows - 1)))):
        if running is not None:
            running.lerp_(value.to(running.dtype), momentum)
    return mean, torch.rsqrt(var + eps)


def batch_apply(features, residual, mean, rstd, weight, bias, activation, dtype=None) -> torch.Tensor:
    return ACTIVATE[activation](_normal(features, residual, mean, rstd, weight, bias)).to(dtype or features.dtype)


def batch_norm_backward(
    grad, features, residual, mean, rstd, weight, bias, training, activation
) -> tuple[torch.Tensor | None, ...]:
    weight, (mean, rstd) = _packed(weight), _statistics(features, mean, rstd)
    if activation is not None:
        y = _normal(features, residual, mean, rstd, weight, bias)
        grad = _before_activation(grad, y, activation).to(grad.dtype)
    grad_residual = None if residual is None else grad
    if not training:
        scale = rstd if weight is None else rstd * weight
        return grad * scale, (grad * (features - mean)).sum(0) * rstd, _sum(grad), grad_residual
    weight = None if weight is None else weight.to(mean.dtype)  # beside half-precision rows as the statistics are
    image, grad_weight, _ = torch.ops.aten.native_batch_norm_backward(
        _image(grad), _image(features), weight, None, None, mean, rstd, True, 0.0, (True, weight is not None, False)
    )
    return _rows(image), grad_weight, _sum(grad), grad_residual


def layer_norm_forward(features, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.native_layer_norm(features, features.shape[1:], weight, bias, eps)


def layer_norm_backward(grad, features, weight, bias, mean, rstd) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Autocast runs the forward in float32 on some devices.
    features = features.to(grad.dtype)
    if weight is not None:
        weight = weight.to(torch.promote_types(weight.dtype, grad.dtype))
    wanted = (True, weight is not None, bias is not None)
    return torch.ops.aten.native_layer_norm_backward(
        grad, features, features.shape[1:], mean, rstd, weight, bias, wanted
    )


def _sum(grad: torch.Tensor) -> torch.Tensor:
    """Over the rows, not rounded to half precision, which the bias need not have."""
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))


def _packed(vector: torch.Tensor | None) -> torch.Tensor | None:
    """PyTorch's channels-last kernels do not look at the stride of a weight."""
    return None if vector is None else vector.contiguous()


def _image(rows: torch.Tensor) -> torch.Tensor:
    """The rows as a (1, C, N, 1) channels-last map, which takes the vectorised path; as (N, C) they do not."""
    return rows.contiguous()[None, :, None].permute(0, 3, 1, 2)


def _rows(image: torch.Tensor) -> torch.Tensor:
    # Detached it is no view to autograd, so that it may be written to in place.
    return image.permute(0, 2, 3, 1).reshape(image.shape[2], image.shape[1]).detach()


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _statistics(features, mean, rstd) -> tuple[torch.Tensor, torch.Tensor]:
    if mean is None:
        mean = features.new_zeros(features.shape[1], dtype=torch.promote_types(features.dtype, torch.float32))
    return mean, torch.ones_like(mean) if rstd is None else rstd


def _normal(features, residual, mean, rstd, weight, bias) -> torch.Tensor:
    mean, rstd = _statistics(features, mean, rstd)
    y = (_wide(features) - mean).mul_(rstd if weight is None else rstd * weight)
    for added in (bias, residual):
        y = y if added is None else y.add_(added)
    return y


def _before_activation(grad, y, activation) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(_wide(grad), y)
    return grad.masked_fill(y <= 0 if activation == "relu" else (y <= 0) | (y >= 6), 0)
