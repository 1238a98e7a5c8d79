"""Functions of single pixels act on the rows. Dense tensors among their arguments are broadcast to the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spark_fast.ops.densify import gather_patches
from spark_fast.rules.registry import SparseOpError, name_of, named, where
from spark_fast.rules.views import make
from spark_fast.tensor import SparseMap

_UNARY = (
    "relu relu_ relu6 gelu silu mish sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardsigmoid "
    "leaky_relu leaky_relu_ elu elu_ celu celu_ selu selu_ softplus softsign logsigmoid hardshrink softshrink "
    "tanhshrink threshold threshold_ clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip abs abs_ neg neg_ "
    "negative exp exp_ expm1 log log1p log2 sqrt sqrt_ rsqrt rsqrt_ square square_ erf sin cos atan reciprocal sign "
    "pow pow_ float half double bfloat16 detach clone dropout dropout_ alpha_dropout rrelu rrelu_ nan_to_num round "
    "floor ceil zero_ fill_ zeros_like ones_like full_like rand_like randn_like empty_like isnan isfinite isinf "
    "logical_not bernoulli normal_ bernoulli_ erfc sinc exp2 sinh cosh tan asin acos atanh asinh acosh "
)
_BINARY = (
    "add add_ sub sub_ subtract mul mul_ multiply div div_ divide true_divide maximum minimum fmod remainder lerp "
    "lerp_ addcmul addcmul_ addcdiv where masked_fill masked_fill_ gt lt ge le logical_and logical_or atan2 hypot "
    "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
    "__rtruediv__ __itruediv__ __pow__ __rpow__ __neg__ __abs__ __gt__ __lt__ __ge__ __le__ __and__ __or__ __invert__"
)
POINTWISE = frozenset(named(f"{_UNARY} {_BINARY}"))


def pointwise(func: Callable, args: tuple, kwargs: dict) -> SparseMap:
    like = common(func, args + tuple(kwargs.values()))
    if "out" in kwargs or (_in_place(func) and not isinstance(args[0], SparseMap)):
        raise SparseOpError(
            f"{name_of(func)}{where()} would write a sparse result into a dense tensor; write x.to_dense() into it"
        )
    kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}  # rows have one
    rows = [rows_of(a, like) for a in args]
    out = func(*rows, **{name: rows_of(a, like) for name, a in kwargs.items()})
    if isinstance(args[0], SparseMap) and out is args[0].features:
        return args[0]  # in place
    return make(out, like, like.dims)


def _in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__iadd__", "__isub__", "__imul__", "__itruediv__") or (name[-1:] == "_" and name[-2:] != "__")


def common(func: Callable, values: tuple) -> SparseMap:
    """The first sparse map; raises if another has other patches, side or order of dimensions."""
    foreign = [v for v in values if hasattr(type(v), "__torch_function__") and not isinstance(v, torch.Tensor)]
    sparse = [v for v in foreign if isinstance(v, SparseMap)]
    if len(sparse) < len(foreign):
        kinds = " and ".join(sorted({type(v).__name__ for v in foreign}))
        raise SparseOpError(f"{name_of(func)}{where()}: {kinds} do not go together")
    first = sparse[0]
    for other in sparse[1:]:
        if other.patches is not first.patches:
            raise ValueError(
                f"{name_of(func)}: the sparse tensors have different ActivePatches; use one "
                "for all, and patches that are whole pixels in the coarsest map (patch_size)"
            )
        if other.side != first.side or other.dims != first.dims:
            raise ValueError(f"{name_of(func)}: sparse tensors of shapes {tuple(first.shape)} and {tuple(other.shape)}")
    return first


def rows_of(value, like: SparseMap):
    """A pointwise operand as rows (N, *channels), or broadcastable to them."""
    if isinstance(value, SparseMap):
        return value.features
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    shape, dims = like.shape, like.dims
    if value.dim() > len(dims) or "X" in dims:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} does not broadcast to {tuple(shape)}")
    value = value.reshape((1,) * (len(dims) - value.dim()) + tuple(value.shape))
    channel_places = [place for place, name in enumerate(dims) if name == "C"]
    value = value.permute([dims.index(name) for name in "BHW"] + channel_places)
    batch, height, width, *channels = value.shape
    if height == width == 1:
        if batch == 1:
            return value.reshape(1, *channels)
        if batch == like.patches.batch:
            return per_image_rows(value.reshape(batch, *channels), like)
    gh, gw = like.patches.grid
    full = value.expand(like.patches.batch, gh * like.side, gw * like.side, *channels)
    full = full.reshape(*full.shape[:3], torch.Size(channels).numel()).permute(0, 3, 1, 2)
    if full.is_floating_point():
        rows = gather_patches(full, like.patches)
    else:  # a condition
        rows = gather_patches(full.to(torch.float32), like.patches).to(full.dtype)
    return rows.reshape(rows.shape[0], *channels)


def per_image_rows(values: torch.Tensor, like: SparseMap) -> torch.Tensor:
    """Values (B, *channels) of each image, repeated for its rows: (N, *channels)."""
    per_patch = values[like.patches.index[0]]
    return per_patch.repeat_interleave(like.side**2, 0, output_size=like.features.shape[0])
