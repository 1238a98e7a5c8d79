"""PaddedMap: what F.pad gives. Zeros around a map are a window's own padding, so nothing is computed before the
convolution or pooling that follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from spark_fast.nn import functional
from spark_fast.ops.conv import convolve
from spark_fast.ops.conv.api import conv_window
from spark_fast.ops.pool import avg_pool, max_pool, pool_window
from spark_fast.rules.dense import on_dense
from spark_fast.rules.registry import SparseOpError, check_differentiable, name_of, rule, where
from spark_fast.rules.views import SparseView, make
from spark_fast.tensor import SparseMap, SparseTensor


class PaddedMap:
    """A sparse map and the padding around it, which a convolution or pooling takes up.

    Attributes:
        map: (..., H, W).
        pad: left, right, top, bottom; negative ones crop.
        mode, value: as in F.pad.
    """

    __slots__ = ("_map", "mode", "pad", "value", "version")

    def __init__(self, map: SparseMap, pad: tuple[int, int, int, int], mode: str, value: float):
        self._map, self.pad, self.mode, self.value = map, pad, mode, value
        self.version = _version(map)

    @property
    def map(self) -> SparseMap:
        """
        Raises:
            SparseOpError: it was changed in place since it was padded; PyTorch's padding is a copy.
        """
        if _version(self._map) != self.version:
            raise SparseOpError(f"pad{where()}: the map was changed in place after it was padded; pad it afterwards")
        return self._map

    @property
    def shape(self) -> torch.Size:
        *lead, height, width = self.map.shape
        left, right, top, bottom = self.pad
        return torch.Size((*lead, height + top + bottom, width + left + right))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.map.dims)

    ndim = property(lambda self: self.dim())
    dtype = property(lambda self: self.map.dtype)
    device = property(lambda self: self.map.device)
    requires_grad = property(lambda self: self.map.requires_grad)

    def to_dense(self) -> torch.Tensor:
        full = self.map.to_dense()
        pad = self.pad[:2] if full.dim() == 3 and not any(self.pad[2:]) else self.pad
        return F.pad(full, pad, self.mode, self.value)

    @property
    def border(self) -> float | None:
        """The value around the map; None where it is no constant."""
        return self.value if self.mode == "constant" else None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        check_differentiable()
        handler = RULES.get(func)
        if handler is None:
            raise SparseOpError(
                f"{name_of(func)}{where()}: of a padded sparse map only a convolution or a pooling can be taken"
            )
        return handler(*args, **(kwargs or {}))

    def __getattr__(self, name: str):
        method = None if name.startswith("__") else getattr(torch.Tensor, name, None)
        if not callable(method):
            raise AttributeError(f"PaddedMap has no attribute {name!r}")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __repr__(self) -> str:
        return f"PaddedMap({self.map}, pad={self.pad}, mode={self.mode!r}, value={self.value})"


def _version(x: SparseMap) -> int:
    """Counts the changes in place; not kept in inference mode or inside torch.compile."""
    rows = x.features
    return 0 if torch.compiler.is_compiling() or rows.is_inference() else rows._version


@rule(F.pad)
def _pad(input, pad, mode="constant", value=None):
    pad = tuple(pad)
    on_channels = _channel_pad(input, pad)
    if on_channels is not None and mode == "constant":
        return make(F.pad(input.features, on_channels, value=value or 0.0), input, input.dims)
    if input.dims[-2:] != "HW" or len(pad) > 4 or len(pad) % 2:
        raise SparseOpError(f"pad{where()}: only height and width of (B, C, H, W); got {pad} for {input.dims}")
    if not any(pad):
        return input
    return PaddedMap(input, pad + (0,) * (4 - len(pad)), mode, value or 0.0)


def _channel_pad(x: SparseMap, pad: tuple[int, ...]) -> list[int] | None:
    """`pad` for the rows if it pads channels only."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True)) if len(pad) % 2 == 0 else []
    named = list(zip(x.dims[::-1], pairs, strict=False))  # from the last dimension on
    if len(pairs) > len(x.dims) or not any(name == "C" and any(pair) for name, pair in named):
        return None
    if any(name != "C" and any(pair) for name, pair in named):
        return None
    return [n for name, pair in named if name in "CX" for n in pair]


def _pad_again(input, pad, mode="constant", value=None):
    if (mode, value or 0.0) != (input.mode, input.value) or mode != "constant" or len(pad) > 4:
        raise SparseOpError(f"pad{where()}: padded twice, in different ways")
    pad = tuple(pad) + (0,) * (4 - len(pad))
    if any(a < 0 < b for a, b in zip(input.pad, pad, strict=True)):
        raise SparseOpError(f"pad{where()}: a crop that is padded again: {input.pad}, then {pad}")
    return PaddedMap(input.map, tuple(a + b for a, b in zip(input.pad, pad, strict=True)), mode, input.value)


def _windowed(op: str, x: PaddedMap, window, run: Callable, *settings) -> SparseTensor:
    left, right, top, bottom = x.pad
    return functional.windowed(op, x.map, window.padded(top, bottom, left, right), "mask", False, run, *settings)


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if not isinstance(input, PaddedMap):
        raise SparseOpError(f"conv2d{where()}: the weight is sparse, the input is not")
    if input.border == 0 and not isinstance(padding, str):
        window = conv_window(weight, stride, padding, dilation)
        if isinstance(input.map, SparseTensor) and not _crops_under(input, window):
            return _windowed("conv2d", input, window, convolve, weight, bias, groups)
        left, right, top, bottom = input.pad
        if not isinstance(input.map, SparseTensor) and not _crops_under(input, window):
            return per_image_conv2d(input.map, window.padded(top, bottom, left, right), weight, bias, groups)
    settings = (stride, padding, dilation, groups)
    return _on_dense("conv2d", input, lambda: F.conv2d(input.to_dense(), weight, bias, *settings))


def _crops_under(x: PaddedMap, window) -> bool:
    """Are pixels cropped where the window begins, or where its own padding stands? Its padding cannot say that."""
    left, right, top, bottom = x.pad
    return min(left, top) < 0 or (min(right, bottom) < 0 and window.padding != (0, 0))


def per_image_conv2d(x: SparseMap, window, weight, bias, groups: int) -> SparseMap:
    """A convolution with kernels of its own for each image, written as a grouped one of (1, B * C, H, W)."""
    batch = x.patches.batch
    if x.dims != "CXHW" or x.shape[0] != 1 or groups % batch:
        raise SparseOpError(f"conv2d{where()} expects (B, C, H, W), got {tuple(x.shape)} with dimensions {x.dims}")
    weights = weight.unflatten(0, (batch, -1))
    biases = [None] * batch if bias is None else bias.unflatten(0, (batch, -1))
    parts = []
    for image, rows in enumerate(_rows_by_image(x)):
        one = SparseTensor(rows, x.patches.image(image), x.side)
        settings = (weights[image], biases[image], groups // batch)
        parts.append(functional.windowed("conv2d", one, window, "mask", False, convolve, *settings))
    size = tuple(parts[0].shape[2:])
    patches = x.patches.at(size)
    if patches is not x.patches:
        raise SparseOpError(f"conv2d{where()}: kernels for each image need padding that keeps whole patches")
    return SparseView(torch.cat([p.features for p in parts])[:, None], patches, parts[0].side, "CXHW")


def _rows_by_image(x: SparseMap) -> list[torch.Tensor]:
    rows = x.features.flatten(1)
    if x.patches.per_image is not None:
        return list(rows.split(x.patches.per_image * x.side**2) if rows.shape[0] else [rows] * x.patches.batch)
    return list(rows.split([n * x.side**2 for n in x.patches.active.flatten(1).sum(1).tolist()]))


def _max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    plain = isinstance(input.map, SparseTensor) and not ceil_mode and not return_indices
    if plain and input.border in (0, -torch.inf):
        window = pool_window("max_pool2d", kernel_size, stride, padding, dilation)
        folds = not _crops_under(input, window)
        if folds and input.border < 0:
            return _windowed("max_pool2d", input, window, max_pool)
        if folds and window.padding == (0, 0):
            out = _windowed("max_pool2d", input, window, max_pool)
            return _at_least_zero(out, _reaches_border(input, window, tuple(out.shape[2:])))
    settings = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return _on_dense("max_pool2d", input, lambda: F.max_pool2d(input.to_dense(), *settings))


def _reaches_border(x: PaddedMap, window, size: tuple[int, int]) -> torch.Tensor:
    """bool (1, 1, *size): does the window of an output pixel hold one of the zeros around the map?"""
    inside = F.pad(torch.zeros(1, 1, *x.map.shape[2:], device=x.device), x.pad, value=1.0)
    return F.max_pool2d(inside, window.kernel, window.stride, 0, window.dilation) > 0


def _at_least_zero(x: SparseTensor, where_to: torch.Tensor) -> SparseTensor:
    return torch.where(where_to, x.clamp(min=0), x)


def _avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    window = pool_window("avg_pool2d", kernel_size, stride, padding)
    own = window.padding == (0, 0) and not ceil_mode and not _crops_under(input, window)
    if isinstance(input.map, SparseTensor) and input.border == 0 and own:
        # The zeros around the map count as pixels.
        return _windowed("avg_pool2d", input, window, avg_pool, True, divisor_override or window.taps)
    settings = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _on_dense("avg_pool2d", input, lambda: F.avg_pool2d(input.to_dense(), *settings))


def _on_dense(op: str, x: PaddedMap, compute: Callable[[], torch.Tensor]) -> SparseTensor:
    if not isinstance(x.map, SparseTensor):
        raise SparseOpError(f"{op}{where()}: padded (B, C, H, W) only; got dimensions {x.map.dims}")
    return on_dense(f"{op} after pad(mode={x.mode!r})", x.map, compute)


RULES = {
    F.pad: _pad_again,
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    torch._C._nn.avg_pool2d: _avg_pool2d,
}
