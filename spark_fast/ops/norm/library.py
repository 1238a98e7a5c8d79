"""PyTorch's own kernels on the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IN_PLACE = {None: lambda y: y, "relu": F.relu_, "relu6": lambda y: F.relu6(y, inplace=True)}


def batch_norm_forward(
    features, weight, bias, running_mean, running_var, training, momentum, eps, activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, bias = _packed(weight), _packed(bias)
    image, mean, rstd = torch.native_batch_norm(
        _image(features), weight, bias, running_mean, running_var, training, momentum, eps
    )
    if not training:
        mean = running_mean.clone()
        rstd = torch.rsqrt(running_var.to(torch.promote_types(running_var.dtype, torch.float32)) + eps)
    return IN_PLACE[activation](_rows(image)), mean, rstd


def batch_norm_backward(
    grad, features, weight, bias, mean, rstd, training, activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = _packed(weight)
    grad = _before(activation, grad, features, weight, bias, mean, rstd)
    if not training:
        scale = rstd if weight is None else rstd * weight
        return grad * scale, (grad * (features - mean)).sum(0) * rstd, _sum(grad)
    image, grad_weight, _ = torch.ops.aten.native_batch_norm_backward(
        _image(grad), _image(features), weight, None, None, mean, rstd, True, 0.0, (True, weight is not None, False)
    )
    return _rows(image), grad_weight, _sum(grad)


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


def _before(activation, grad, features, weight, bias, mean, rstd) -> torch.Tensor:
    """The gradient of the activation's input, which is computed again."""
    if activation is None:
        return grad
    y = (features - mean) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y.to(grad.dtype)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, y, 0)
    return torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)
