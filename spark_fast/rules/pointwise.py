"""Functions of single pixels act on the rows. Dense tensors among their arguments are broadcast to the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spark_fast.ops.densify import gather_patches
from spark_fast.rules.registry import SparseOpError, name_of, named, where
from spark_fast.rules.views import make
from spark_fast.tensor import SparseMap

# Each with its form in place, where there is one.
_UNARY = (
    "relu relu6 gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu celu selu softplus softsign "
    "logsigmoid hardshrink softshrink tanhshrink threshold dropout alpha_dropout rrelu clamp clamp_min clamp_max clip "
    "abs neg negative positive exp exp2 expm1 log log1p log2 log10 logit sqrt rsqrt square pow float_power reciprocal "
    "sign sgn signbit sin cos tan asin acos atan sinh cosh asinh acosh atanh sinc erf erfc erfinv lgamma digamma "
    "deg2rad rad2deg round floor ceil trunc frac nan_to_num isnan isfinite isinf logical_not float half double "
    "bfloat16 detach clone fill zero_ zeros_like ones_like full_like rand_like randn_like empty_like bernoulli "
    "normal_ "
)
_BINARY = (
    "add sub subtract rsub mul multiply div divide true_divide floor_divide fmod remainder maximum minimum fmax fmin "
    "lerp addcmul addcdiv where masked_fill atan2 hypot copysign logaddexp logaddexp2 xlogy heaviside logical_and "
    "logical_or logical_xor gt ge lt le eq ne greater greater_equal less less_equal not_equal "
    "__gt__ __ge__ __lt__ __le__ __eq__ __ne__ __floordiv__ __mod__ "
    "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ "
    "__itruediv__ __pow__ __rpow__ __neg__ __abs__ __and__ __or__ __invert__"
)
POINTWISE = frozenset(named(" ".join(f"{name} {name}_" for name in f"{_UNARY} {_BINARY}".split())))


def pointwise(func: Callable, args: tuple, kwargs: dict) -> SparseMap:
    like = common(func, args + tuple(kwargs.values()))
    first = args[0] if args else kwargs.get("input")
    if "out" in kwargs or (_in_place(func) and not isinstance(first, SparseMap)):
        raise SparseOpError(
            f"{name_of(func)}{where()} would write a sparse result into a dense tensor; write x.to_dense() into it"
        )
    kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}  # rows have one
    rows = [rows_of(a, like) for a in args]
    out = func(*rows, **{name: rows_of(a, like) for name, a in kwargs.items()})
    if isinstance(first, SparseMap) and out is first.features:
        return first  # in place
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
    sizes = (1,) * (len(dims) - value.dim()) + tuple(value.shape)
    fits = len(sizes) == len(dims) and all(n in (1, m) for n, m, d in zip(sizes, shape, dims, strict=True) if d != "C")
    if not fits:
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} does not broadcast to {tuple(shape)}, of which only channels grow"
        )
    if "X" in dims:  # the batch apart from the channels that are joined with it
        place, batch = dims.index("X"), like.patches.batch
        apart = (batch, sizes[place] // max(batch, 1)) if sizes[place] == shape[place] else (1, 1)
        sizes, dims = (*sizes[:place], *apart, *sizes[place + 1 :]), dims.replace("X", "BC")
    value = value.reshape(sizes)
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
    full = full.reshape(*full.shape[:3], torch.Size(channels).numel())
    if full.is_floating_point():
        rows = gather_patches(full.permute(0, 3, 1, 2), like.patches)
    else:  # a condition, or whole numbers
        rows = full[like.patches.pixel_coords(like.side).long().unbind(1)]
    return rows.reshape(rows.shape[0], *channels)


def per_image_rows(values: torch.Tensor, like: SparseMap) -> torch.Tensor:
    """Values (B, *channels) of each image, repeated for its rows: (N, *channels)."""
    per_patch = values[like.patches.index[0]]
    return per_patch.repeat_interleave(like.side**2, 0, output_size=like.features.shape[0])
