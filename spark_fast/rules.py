"""Sparse rules: what a PyTorch function does to a SparseTensor.

`apply` looks the function up. Without a rule, an operation that only looks at a pixel's neighbourhood runs on the
dense, zero-filled map and is masked again, which is the exact meaning (one warning per operation); any other operation
raises SparseOpError.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from spark_fast.nn import functional
from spark_fast.ops.densify import gather_patches
from spark_fast.ops.linear import linear
from spark_fast.ops.norm import batch_norm, layer_norm
from spark_fast.tensor import SparseTensor

RULES: dict[Callable, Callable] = {}
_warned: set[Callable] = set()


class SparseOpError(NotImplementedError):
    """An operation has no sparse rule and no exact dense form on a masked map."""


def rule(*functions: Callable) -> Callable:
    """Registers the decorated function as the sparse rule of `functions`; it receives their arguments."""

    def register(handler: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


def named(names: str, *spaces: object) -> list[Callable]:
    """The functions of these names in torch, torch.Tensor and torch.nn.functional."""
    spaces = spaces or (torch, torch.Tensor, F)
    return [f for name in names.split() for space in spaces if callable(f := getattr(space, name, None))]


def apply(func: Callable, args: tuple, kwargs: dict):
    """Runs `func` on arguments of which at least one is a SparseTensor.

    Raises:
        SparseOpError: there is no rule.
    """
    handler = RULES.get(func)
    if handler is not None:
        return handler(*args, **kwargs)
    if func in POINTWISE:
        return _pointwise(func, args, kwargs)
    if func in LOCAL:
        return _through_dense(func, args, kwargs)
    raise SparseOpError(
        f"{_name(func)}{_where()} has no sparse rule. On a masked map its meaning is not that of the dense operation. "
        "Register one with @spark_fast.rule(function), or convert with x.to_dense() where that is what you mean"
    )


def _name(func: Callable) -> str:
    if "<locals>" in getattr(func, "__qualname__", ""):  # F.adaptive_max_pool2d and its like are closures
        return next((name for name, value in vars(F).items() if value is func), func.__name__)
    return getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))


def _where() -> str:
    """The innermost module whose forward is running, from the call stack."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return f" (called in {type(owner).__name__})"
        frame = frame.f_back
    return ""


# Functions of single pixels: they act on the rows. Dense tensors among the arguments are broadcast to the rows.
_UNARY = (
    "relu relu_ relu6 gelu silu mish sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardsigmoid leaky_relu "
    "leaky_relu_ elu elu_ celu selu selu_ softplus softsign logsigmoid hardshrink softshrink tanhshrink threshold "
    "threshold_ clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip abs abs_ neg neg_ exp log sqrt rsqrt "
    "square erf sin cos reciprocal sign pow pow_ float half double bfloat16 detach clone dropout dropout_ "
    "alpha_dropout rrelu nan_to_num round floor ceil zero_ fill_ zeros_like ones_like"
)
_BINARY = (
    "add add_ sub sub_ mul mul_ div div_ true_divide maximum minimum fmod remainder lerp addcmul "
    "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
    "__rtruediv__ __itruediv__ __pow__ __rpow__ __neg__ __abs__"
)
POINTWISE = frozenset(named(f"{_UNARY} {_BINARY}"))
# Functions of a pixel's neighbourhood: exact through the zero-filled dense map.
LOCAL = frozenset(named("lp_pool2d interpolate upsample pixel_shuffle pixel_unshuffle local_response_norm"))


def _pointwise(func: Callable, args: tuple, kwargs: dict) -> SparseTensor:
    like = _common(func, args + tuple(kwargs.values()))
    if "out" in kwargs or (_in_place(func) and not isinstance(args[0], SparseTensor)):
        raise SparseOpError(
            f"{_name(func)}{_where()} would write a sparse result into a dense tensor; write x.to_dense() into it"
        )
    rows = [_rows_of(a, like) for a in args]
    out = func(*rows, **{name: _rows_of(a, like) for name, a in kwargs.items()})
    if isinstance(args[0], SparseTensor) and out is args[0].features:
        return args[0]  # in place
    return like.with_features(out)


def _in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__iadd__", "__isub__", "__imul__", "__itruediv__") or (name[-1:] == "_" and name[-2:] != "__")


def _common(func: Callable, values: tuple) -> SparseTensor:
    """The first SparseTensor; raises if another has other patches, side or order of dimensions."""
    sparse = [v for v in values if isinstance(v, SparseTensor)]
    first = sparse[0]
    for other in sparse[1:]:
        if other.patches is not first.patches:
            raise ValueError(f"{_name(func)}: the sparse tensors have different ActivePatches; use one for all")
        if other.side != first.side or other.channels_last != first.channels_last:
            raise ValueError(f"{_name(func)}: sparse tensors of shapes {tuple(first.shape)} and {tuple(other.shape)}")
    return first


def _rows_of(value, like: SparseTensor):
    """A pointwise operand as rows: (N, C) or broadcastable to it."""
    if isinstance(value, SparseTensor):
        return value.features
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.dim() > 4:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} does not broadcast to {tuple(like.shape)}")
    value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
    if like.channels_last:
        value = value.permute(0, 3, 1, 2)
    batch, channels, height, width = value.shape
    if height == width == 1:
        if batch == 1:
            return value.reshape(1, channels)
        if batch == like.patches.batch:
            image = like.patches.index[0]
            per_patch = value.reshape(batch, channels)[image]
            return per_patch.repeat_interleave(like.side**2, 0, output_size=like.features.shape[0])
    gh, gw = like.patches.grid
    full = value.expand(like.patches.batch, channels, gh * like.side, gw * like.side)
    return gather_patches(full, like.patches)


def _through_dense(func: Callable, args: tuple, kwargs: dict) -> SparseTensor:
    like = _common(func, args + tuple(kwargs.values()))
    if like.channels_last:
        raise SparseOpError(f"{_name(func)}{_where()} expects (B, C, H, W), the tensor is channels-last")
    if func not in _warned:
        _warned.add(func)
        warnings.warn(
            f"{_name(func)}{_where()} has no sparse rule: it runs on the dense, zero-filled map and is masked again "
            "(exact, but no pixel is skipped)",
            stacklevel=4,
        )
    dense = [a.to_dense() if isinstance(a, SparseTensor) else a for a in args]
    out = func(*dense, **{k: v.to_dense() if isinstance(v, SparseTensor) else v for k, v in kwargs.items()})
    return SparseTensor.from_dense(out, like.patches)


def _channels_last_only(op: str, x: SparseTensor) -> None:
    if not x.channels_last:
        raise SparseOpError(
            f"{op}{_where()} acts on the last dimension, which is the width of {tuple(x.shape)}; "
            "use it on x.permute(0, 2, 3, 1)"
        )


def _channels_first_only(op: str, x: SparseTensor) -> None:
    if x.channels_last:
        raise SparseOpError(f"{op}{_where()} expects (B, C, H, W); permute(0, 3, 1, 2) the channels-last tensor first")


@rule(torch.conv2d, F.conv2d)
def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if not isinstance(input, SparseTensor):
        raise SparseOpError("conv2d: the weight is a SparseTensor, the input is not")
    _channels_first_only("conv2d", input)
    return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


@rule(*named("conv_transpose2d", torch, F))
def _conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    if not isinstance(input, SparseTensor):
        raise SparseOpError("conv_transpose2d: the weight is a SparseTensor, the input is not")
    _channels_first_only("conv_transpose2d", input)
    return functional.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


@rule(F.max_pool2d, torch.max_pool2d)
def _max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    _channels_first_only("max_pool2d", input)
    if return_indices:
        raise SparseOpError("max_pool2d: return_indices=True has no meaning on packed rows")
    return functional.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


@rule(F.avg_pool2d, torch._C._nn.avg_pool2d)
def _avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    _channels_first_only("avg_pool2d", input)
    settings = (padding, ceil_mode, count_include_pad, divisor_override)
    return functional.avg_pool2d(input, kernel_size, stride, *settings)


@rule(F.batch_norm)
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    _channels_first_only("batch_norm", input)
    return input.with_features(
        batch_norm(input.features, running_mean, running_var, weight, bias, training, momentum, eps)
    )


@rule(F.layer_norm, torch.layer_norm)
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    _channels_last_only("layer_norm", input)
    if tuple(normalized_shape) != (input.features.shape[1],):
        raise SparseOpError(
            f"layer_norm{_where()}: normalized_shape must be the {input.features.shape[1]} channels; got "
            f"{tuple(normalized_shape)}. Norms over space would mix masked pixels in"
        )
    return input.with_features(layer_norm(input.features, weight, bias, eps))


@rule(F.linear)
def _linear(input, weight, bias=None):
    _channels_last_only("linear", input)
    return input.with_features(linear(input.features, weight, bias))


@rule(F.prelu, torch.prelu)
def _prelu(input, weight):
    _channels_first_only("prelu", input)
    return input.with_features(F.prelu(input.features, weight))


@rule(*named("cat concat concatenate", torch))
def _cat(tensors, dim=0):
    if not all(isinstance(t, SparseTensor) for t in tensors):
        raise SparseOpError(f"cat{_where()}: sparse and dense tensors together; use SparseTensor.from_dense first")
    like = _common(torch.cat, tuple(tensors))
    if dim % 4 != (3 if like.channels_last else 1):
        raise SparseOpError(f"cat{_where()}: only channels can be joined; got dim={dim} of {tuple(like.shape)}")
    return like.with_features(torch.cat([t.features for t in tensors], dim=1))


def _channel_pieces(function: Callable) -> Callable:
    def split(input, size, dim=0):
        if dim % 4 != (3 if input.channels_last else 1):
            raise SparseOpError(f"{_name(function)}{_where()}: only channels can be split; got dim={dim}")
        return tuple(input.with_features(piece) for piece in function(input.features, size, dim=1))

    return split


for _function in named("split chunk tensor_split", torch, torch.Tensor):
    RULES[_function] = _channel_pieces(_function)


@rule(torch.Tensor.__getitem__)
def _getitem(input, index):
    index = index if isinstance(index, tuple) else (index,)
    channel = 3 if input.channels_last else 1
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index = index[:place] + (slice(None),) * (5 - len(index)) + index[place + 1 :]
    others = [i for n, i in enumerate(index) if n != channel]
    kept = index[channel] if len(index) > channel else slice(None)
    if len(index) > 4 or any(i != slice(None) for i in others) or not isinstance(kept, slice):
        raise SparseOpError(f"indexing{_where()}: only a slice of channels, as x[:, a:b], has a sparse meaning")
    return input.with_features(input.features[:, kept])


@rule(*named("permute", torch, torch.Tensor))
def _permute(input, *dims):
    dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    dims = tuple(d % 4 for d in dims)
    if dims == (0, 1, 2, 3):
        return input
    if dims != ((0, 3, 1, 2) if input.channels_last else (0, 2, 3, 1)):
        raise SparseOpError(f"permute{_where()}: only channels-last (0, 2, 3, 1) and back (0, 3, 1, 2); got {dims}")
    return SparseTensor(input.features, input.patches, input.side, not input.channels_last)


@rule(torch.Tensor.contiguous)
def _contiguous(input, *args, **kwargs):
    return input


@rule(torch.Tensor.requires_grad_)
def _requires_grad_(input, requires_grad=True):
    input.features.requires_grad_(requires_grad)
    return input


@rule(torch.Tensor.type_as)
def _type_as(input, other):
    return input.to(other.dtype)


@rule(torch.Tensor.to)
def _to(input, *args, **kwargs):
    features = input.features.to(*args, **kwargs)
    if features.device != input.patches.device:
        raise SparseOpError("moving a SparseTensor to another device: move the images and the mask, and build it there")
    return input.with_features(features)


def _image_sum(x: SparseTensor) -> tuple[torch.Tensor, torch.Tensor | int]:
    """Sum over each image's active pixels (B, C), and their number (B, 1) or one for all."""
    patches, area = x.patches, x.side**2
    rows = x.features.to(torch.promote_types(x.dtype, torch.float32))  # a sum may not fit the smaller type
    if patches.per_image is not None:
        return rows.view(patches.batch, -1, rows.shape[1]).sum(1), max(patches.per_image * area, 1)
    image = patches.index[0].repeat_interleave(area, output_size=rows.shape[0])
    total = rows.new_zeros(patches.batch, rows.shape[1]).index_add(0, image, rows)
    return total, (patches.active.flatten(1).sum(1, keepdim=True) * area).clamp(min=1)


@rule(torch.mean, torch.Tensor.mean)
def _mean(input, dim=None, keepdim=False, *, dtype=None):
    """Over space only: the mean of each image's active pixels (an image without any gives 0)."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    space = (1, 2) if input.channels_last else (2, 3)
    if tuple(sorted(d % 4 for d in dims)) != space:
        raise SparseOpError(f"mean{_where()}: only over both dimensions of space, {space}; got dim={dim}")
    total, count = _image_sum(input if dtype is None else input.to(dtype))
    mean = (total / count).to(dtype or input.dtype)
    if not keepdim:
        return mean
    return mean[:, None, None] if input.channels_last else mean[..., None, None]


@rule(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(input, output_size):
    sizes = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    _channels_first_only("adaptive_avg_pool2d", input)
    if sizes != (1, 1):
        raise SparseOpError(f"adaptive_avg_pool2d{_where()}: only to size 1; got {output_size}")
    return _mean(input, (2, 3), keepdim=True)
