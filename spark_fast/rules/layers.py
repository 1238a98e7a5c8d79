"""Layers: convolution, pooling, norms, linear, interpolation: each calls its op on the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spark_fast.fusion import batch_norm_of, linear_of
from spark_fast.nn import functional
from spark_fast.ops.conv.api import conv_window
from spark_fast.ops.linear import linear
from spark_fast.ops.norm import layer_norm
from spark_fast.rules.dense import through_dense
from spark_fast.rules.padded import per_image_conv2d
from spark_fast.rules.registry import SparseOpError, named, rule, where
from spark_fast.rules.views import SparseView, channel_place, make, place_of, plain
from spark_fast.tensor import SparseMap, SparseTensor


@rule(torch.conv2d, F.conv2d)
def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(input, SparseView) and "X" in input.dims:
        return per_image_conv2d(input, conv_window(weight, stride, padding, dilation), weight, bias, groups)
    x = plain("conv2d", input)
    if x.fusion is not None and _is_linear(x, weight, stride, padding, groups):
        return linear_of(x, weight.flatten(1), bias)
    return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _is_linear(x: SparseTensor, weight, stride, padding, groups: int) -> bool:
    return (
        weight.shape[1:] == (x.shape[1], 1, 1)
        and stride in (1, (1, 1), [1, 1])
        and padding in (0, (0, 0), [0, 0], "same", "valid")
        and groups == 1
    )


@rule(*named("conv_transpose2d", torch, F))
def _conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    settings = (stride, padding, output_padding, groups, dilation)
    return functional.conv_transpose2d(plain("conv_transpose2d", input), weight, bias, *settings)


@rule(F.max_pool2d, torch.max_pool2d)
def _max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    x = plain("max_pool2d", input)
    if return_indices:
        raise SparseOpError("max_pool2d: return_indices=True has no meaning on packed rows")
    return functional.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


@rule(F.avg_pool2d, torch._C._nn.avg_pool2d)
def _avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    settings = (padding, ceil_mode, count_include_pad, divisor_override)
    return functional.avg_pool2d(plain("avg_pool2d", input), kernel_size, stride, *settings)


@rule(F.batch_norm)
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    x = plain("batch_norm", input)
    return batch_norm_of(x, running_mean, running_var, weight, bias, training, momentum, eps)


def _last_channels(op: str, x: SparseMap, normalized_shape: tuple[int, ...]) -> None:
    if x.dims[-len(normalized_shape) :].strip("C") or tuple(normalized_shape) != x.shape[-len(normalized_shape) :]:
        raise SparseOpError(
            f"{op}{where()}: the last dimensions must be channels; normalized_shape {tuple(normalized_shape)} meets "
            f"{tuple(x.shape)} ({x.dims}). Norms over space would mix masked pixels in; for channels use "
            "x.permute(0, 2, 3, 1)"
        )


@rule(F.layer_norm, torch.layer_norm)
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    normalized_shape = tuple(normalized_shape)
    _last_channels("layer_norm", input, normalized_shape)
    if len(normalized_shape) == 1 and input.features.dim() == 2:
        return input.with_features(layer_norm(input.features, weight, bias, eps))
    return input.with_features(F.layer_norm(input.features, normalized_shape, weight, bias, eps))


@rule(F.rms_norm, torch.rms_norm)
def _rms_norm(input, normalized_shape, weight=None, eps=None):
    _last_channels("rms_norm", input, tuple(normalized_shape))
    return input.with_features(F.rms_norm(input.features, normalized_shape, weight, eps))


@rule(F.linear)
def _linear(input, weight, bias=None):
    if not isinstance(input, SparseMap) or input.dims[-1] != "C":
        plain("linear", input, channels_last=True)
    if isinstance(input, SparseTensor):
        return linear_of(input, weight, bias)
    if input.features.dim() == 2:
        return make(linear(input.features, weight, bias), input, input.dims)
    return make(F.linear(input.features, weight, bias), input, input.dims)


@rule(*named("matmul __matmul__", torch, torch.Tensor))
def _matmul(input, other):
    """The channels of a channels-last map times a matrix."""
    channels_last = isinstance(input, SparseMap) and input.dims[-1] == "C"
    if not channels_last or not isinstance(other, torch.Tensor) or other.dim() != 2:
        raise SparseOpError(
            f"matmul{where()}: only the channels of a map, as its last dimension, times a dense matrix; a product over "
            "space has no sparse meaning, but over the active pixels of x.flatten(2)"
        )
    return _linear(input, other.t())


@rule(F.prelu, torch.prelu)
def _prelu(input, weight):
    if input.dims[1] != "C":
        raise SparseOpError(f"prelu{where()}: the second dimension of {input.dims} must be channels")
    at = channel_place(input, 1)
    return input.with_features(F.prelu(input.features.movedim(at, 1), weight).movedim(1, at))


@rule(F.glu, torch._C._nn.glu)
def _glu(input, dim=-1):
    place = place_of("glu", input, dim)
    if input.dims[place] != "C":
        raise SparseOpError(f"glu{where()}: only over channels; got dim={dim} of {input.dims}")
    return make(F.glu(input.features, channel_place(input, place)), input, input.dims)


@rule(F.dropout2d)
def _dropout2d(input, p=0.5, training=True, inplace=False):
    """Whole channels of an image."""
    x = plain("dropout2d", input)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout2d: p must be between 0 and 1; got {p}")
    if not training:
        return x
    if inplace:
        return x.mul_(F.dropout(x.features.new_ones(x.patches.batch, x.features.shape[1], 1, 1), p))
    return x * F.dropout(x.features.new_ones(x.patches.batch, x.features.shape[1], 1, 1), p)


@rule(F.interpolate, F.upsample)
def _interpolate(input, size=None, scale_factor=None, mode="nearest", *args, **kwargs):
    """Nearest by a whole factor repeats or drops rows; all else runs on the dense map."""
    x = plain("interpolate", input)
    height, width = x.shape[2:]
    whole = x.patches.origin is None  # else the result's pixels are those of the mask at its size
    if whole and mode in ("nearest", "nearest-exact") and not args and not any(kwargs.values()):
        if size is not None:
            sizes = (size, size) if isinstance(size, int) else tuple(size)
        else:
            factors = (scale_factor,) * 2 if isinstance(scale_factor, int | float) else tuple(scale_factor)
            if any(f != int(f) for f in factors):  # it takes other pixels than the sizes alone would say
                return through_dense(F.interpolate, (x, size, scale_factor, mode), {})
            sizes = tuple(int(s * f) for s, f in zip((height, width), factors, strict=True))
        up = sizes[0] // height
        if up >= 1 and sizes == (height * up, width * up):
            return _repeated(x, up)
    return through_dense(F.interpolate, (x, size, scale_factor, mode, *args), kwargs)


def _repeated(x, factor: int):
    """Each pixel as factor x factor pixels."""
    if factor == 1:
        return x
    count, channels = x.features.shape
    cells = x.features.view(x.patches.count, x.side, 1, x.side, 1, channels)
    rows = cells.expand(-1, -1, factor, -1, factor, -1).reshape(count * factor**2, channels)
    return x.with_features(rows, x.side * factor)


for _function in named("upsample_nearest"):
    rule(_function)(lambda input, size=None, scale_factor=None: _interpolate(input, size, scale_factor))
