"""Tokens: the active pixels of each image as a sequence, for modules that attend over space.

`x.flatten(2)` of a SparseTensor (B, C, H, W) stands for (B, C, H * W) and holds the K active pixels of each image only,
so that a softmax, a mean or a product over the sequence covers the active pixels. Its shape says K, not H * W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from spark_fast.patches import ActivePatches
from spark_fast.rules.pointwise import POINTWISE
from spark_fast.rules.registry import SparseOpError, check_differentiable, name_of, named, usual_names, where
from spark_fast.rules.views import listed, make, order, place_of
from spark_fast.tensor import SparseMap


class Tokens:
    """A batch of sequences over the active pixels.

    Args:
        values: a tensor of which the dimensions named S run over the K active pixels of each image, in the rows' order.
        dims: the names: B and S, the others C. Rows of attention weights have two S.
    """

    __slots__ = ("dims", "patches", "side", "values")

    def __init__(self, values: torch.Tensor, dims: str, patches: ActivePatches, side: int):
        self.values, self.dims, self.patches, self.side = values, dims, patches, side

    @staticmethod
    def of(x: SparseMap) -> Tokens:
        """`x`, whose height and width stand side by side, with both as one dimension."""
        if x.patches.per_image is None:
            raise SparseOpError(
                f"height and width as one dimension{where()}: the images keep different numbers of pixels, so their "
                "sequences differ in length; use masks that keep the same number in every image"
            )
        length = x.patches.per_image * x.side**2
        rows = x.features.view(x.patches.batch, length, *x.features.shape[1:])
        dims = x.dims.replace("HW", "S")
        values = rows.permute(order("BS" + "C" * (rows.dim() - 2), dims))
        return Tokens(values, dims, x.patches, x.side)

    def like(self, values: torch.Tensor, dims: str):
        """Tokens on the same pixels, or a plain tensor if no dimension runs over them any more."""
        return Tokens(values, dims, self.patches, self.side) if "S" in dims else values

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.values.size() if dim is None else self.values.size(dim)

    def dim(self) -> int:
        return self.values.dim()

    ndim = property(lambda self: self.values.dim())
    dtype = property(lambda self: self.values.dtype)
    device = property(lambda self: self.values.device)
    requires_grad = property(lambda self: self.values.requires_grad)
    is_cuda = property(lambda self: self.values.is_cuda)
    is_nested = is_sparse = is_quantized = False

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return self.values.is_contiguous()

    def is_floating_point(self) -> bool:
        return self.values.is_floating_point()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        check_differentiable()
        kwargs = usual_names(func, kwargs or {})
        handler = RULES.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if func in POINTWISE:
            return _pointwise(func, args, kwargs)
        raise SparseOpError(
            f"{name_of(func)}{where()} has no rule for a sequence of active pixels; neighbours in it need "
            "not be so in the image"
        )

    def __getattr__(self, name: str):
        method = None if name.startswith("__") else getattr(torch.Tensor, name, None)
        if not callable(method):
            raise AttributeError(f"Tokens has no attribute {name!r}")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __repr__(self) -> str:
        return f"Tokens(shape={tuple(self.shape)}, dims={self.dims}, patches={self.patches})"


def _operator(name: str):
    method = getattr(torch.Tensor, name)
    return lambda self, *args: self.__torch_function__(method, (), (self, *args))


for _name in (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__",
    "__pow__", "__matmul__", "__rmatmul__", "__getitem__", "__iadd__", "__imul__", "__isub__", "__itruediv__",
):  # fmt: skip
    setattr(Tokens, _name, _operator(_name))

RULES: dict[Callable, Callable] = {}


def _rule(*functions: Callable) -> Callable:
    def register(handler: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _first(func: Callable, values: Sequence) -> Tokens:
    tokens = [v for v in values if isinstance(v, Tokens)]
    if any(isinstance(v, SparseMap) for v in values):
        raise SparseOpError(f"{name_of(func)}{where()}: a map and a sequence of pixels do not go together")
    if any(t.patches is not tokens[0].patches or t.side != tokens[0].side for t in tokens):
        raise ValueError(f"{name_of(func)}{where()}: sequences over different pixels")
    return tokens[0]


def _pointwise(func: Callable, args: tuple, kwargs: dict):
    values = [*args, *kwargs.values()]
    like = _first(func, values)
    dims = ""
    for v in values:
        if isinstance(v, torch.Tensor | Tokens) and v.dim():
            dims = _joined(func, dims, v.dims if isinstance(v, Tokens) else _names(v.shape))
    out = func(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
    first = args[0]
    if isinstance(first, Tokens) and out is first.values:
        return first
    return like.like(out, dims)


def _names(shape: Sequence[int]) -> str:
    """A plain tensor's dimensions: ones go with anything (1), others are no pixels."""
    return "".join("1" if n == 1 else "C" for n in shape)


def _joined(func: Callable, one: str, other: str) -> str:
    """The names of a broadcast result.

    Raises:
        SparseOpError: pixels meet a dimension of another meaning.
    """
    length = max(len(one), len(other))
    one, other = one.rjust(length, "1"), other.rjust(length, "1")
    names = ""
    for a, b in zip(one, other, strict=True):
        if "S" in (a, b) and {a, b} - {"S", "1"}:
            raise SparseOpError(
                f"{name_of(func)}{where()}: a sequence of active pixels meets a dense dimension. A tensor with a value "
                "for each pixel of the image does not fit it"
            )
        names += "S" if "S" in (a, b) else "B" if "B" in (a, b) else "C" if "C" in (a, b) else "1"
    return names.replace("1", "C") if "S" in names else names


def _plain(value):
    return value.values if isinstance(value, Tokens) else value


@_rule(*named("matmul bmm __matmul__ __rmatmul__", torch, torch.Tensor))
def _matmul(input, other):
    like = _first(torch.matmul, (input, other))
    left, right = (t.dims if isinstance(t, Tokens) else "C" * t.dim() for t in (input, other))
    if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        raise SparseOpError(f"matmul{where()}: the inner dimensions are {left} and {right}")
    lead = _joined(torch.matmul, left[:-2], right[:-2]) if len(left) > 2 or len(right) > 2 else ""
    return like.like(torch.matmul(_plain(input), _plain(other)), lead + left[-2] + right[-1])


RULES[torch.Tensor.__rmatmul__] = lambda input, other: _matmul(other, input)


@_rule(F.scaled_dot_product_attention)
def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    like = _first(F.scaled_dot_product_attention, (query, key, value))
    if is_causal or attn_mask is not None:
        raise SparseOpError(f"scaled_dot_product_attention{where()}: masks and positions do not fit active pixels")
    dims = query.dims if isinstance(query, Tokens) else "C" * query.dim()
    out = F.scaled_dot_product_attention(
        *map(_plain, (query, key, value)), dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
    )
    return like.like(out, dims)


def _softmax(func: Callable) -> Callable:
    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        if isinstance(_stacklevel, torch.dtype):  # the third argument of torch.softmax
            dtype = _stacklevel
        if dim is None or input.dims[place_of(name_of(func), input, dim)] == "B":
            raise SparseOpError(f"{name_of(func)}{where()}: dim={dim} of {input.dims}")
        return input.like(func(input.values, dim, dtype=dtype), input.dims)

    return softmax


for _function in named("softmax log_softmax"):
    RULES[_function] = _softmax(_function)


def _permuted(x: Tokens, places: Sequence[int]) -> Tokens:
    places = [place_of("permute", x, p) for p in places]
    return x.like(x.values.permute(places), "".join(x.dims[p] for p in places))


@_rule(*named("permute", torch, torch.Tensor))
def _permute(input, *numbers, dims=None):
    return _permuted(input, listed(numbers, dims))


@_rule(*named("transpose swapaxes swapdims", torch, torch.Tensor))
def _transpose(input, dim0, dim1):
    places = list(range(len(input.dims)))
    dim0, dim1 = place_of("transpose", input, dim0), place_of("transpose", input, dim1)
    places[dim0], places[dim1] = places[dim1], places[dim0]
    return _permuted(input, places)


@_rule(torch.Tensor.contiguous)
def _contiguous(input, *args, **kwargs):
    return input.like(input.values.clone(memory_format=torch.contiguous_format), input.dims)


@_rule(*named("unsqueeze", torch, torch.Tensor))
def _unsqueeze(input, dim):
    place = dim % (len(input.dims) + 1)
    return input.like(input.values.unsqueeze(place), input.dims[:place] + "C" + input.dims[place:])


@_rule(*named("squeeze", torch, torch.Tensor))
def _squeeze(input, dim):
    place = place_of("squeeze", input, dim)
    if input.dims[place] != "C" or input.values.shape[place] != 1:
        return input
    return input.like(input.values.squeeze(place), input.dims[:place] + input.dims[place + 1 :])


@_rule(*named("view reshape", torch, torch.Tensor))
def _reshape(input, *numbers, shape=None, size=None):
    return _reshaped(input, list(listed(numbers, size if shape is None else shape)))


@_rule(*named("flatten", torch, torch.Tensor))
def _flatten(input, start_dim=0, end_dim=-1):
    shape = list(input.shape)
    start, end = place_of("flatten", input, start_dim), place_of("flatten", input, end_dim)
    if not input.dims[start : end + 1].strip("C"):
        return input.like(input.values.flatten(start, end), input.dims[:start] + "C" + input.dims[end + 1 :])
    return _reshaped(input, shape[:start] + [torch.Size(shape[start : end + 1]).numel()] + shape[end + 1 :])


@_rule(*named("unflatten", torch, torch.Tensor))
def _unflatten(input, dim, sizes):
    shape, place = list(input.shape), place_of("unflatten", input, dim)
    if input.dims[place] == "C":
        dims = input.dims[:place] + "C" * len(sizes) + input.dims[place + 1 :]
        return input.like(input.values.unflatten(place, sizes), dims)
    return _reshaped(input, shape[:place] + list(sizes) + shape[place + 1 :])


def _reshaped(x: Tokens, shape: list[int]):
    """Dimensions of channels are split and joined (also with the batch); pixels stay whole, or become a map again."""
    gh, gw = x.patches.grid
    height, width = gh * x.side, gw * x.side
    length = x.patches.per_image * x.side**2
    # Where the module asks for H, W: a map. Where it asks for H * W: pixels.
    pairs = [j for j in range(len(shape) - 1) if shape[j : j + 2] == [height, width]]
    if x.dims.count("S") == 1:
        for j in pairs:
            found = _match(x, [*shape[:j], length, *shape[j + 2 :]], at=j)
            if found is not None:
                return _map(x, *found)
    found = _match(x, shape)
    if found is None and x.dims.count("S") == 1:
        for j, size in enumerate(shape):
            if size == height * width:
                found = _match(x, [*shape[:j], length, *shape[j + 1 :]], at=j)
                if found is not None:
                    break
    if found is None:
        raise SparseOpError(
            f"reshape{where()}: a sequence of the {length} active pixels of {height}x{width}, {tuple(x.shape)} "
            f"({x.dims}), to {tuple(shape)}"
        )
    dims, sizes = found
    return x.like(x.values.reshape(sizes), dims)


def _map(x: Tokens, dims: str, sizes: list[int]):
    """Back to a map: the S becomes height and width."""
    values = x.values.reshape(sizes)
    if dims.count("B") != 1:
        raise SparseOpError(f"reshape{where()}: {dims} to a map needs the batch as a dimension of its own")
    channels = [p for p, name in enumerate(dims) if name == "C"]
    rows = values.permute([dims.index("B"), dims.index("S"), *channels])
    return make(
        rows.reshape(-1, *rows.shape[2:]) if rows.numel() else rows.flatten(0, 1),
        _Like(x.patches, x.side),
        dims.replace("S", "HW"),
    )


class _Like:
    """What `views.make` asks of a map."""

    fusion = None

    def __init__(self, patches: ActivePatches, side: int):
        self.patches, self.side = patches, side


def _match(x: Tokens, shape: list[int], at: int | None = None) -> tuple[str, list[int]] | None:
    """The names and sizes of `shape`, in which each S must be found whole, at `at` if given."""
    shape = list(shape)
    if -1 in shape:
        known = -torch.Size(shape).numel()
        if not known or x.values.numel() % known:
            return None
        shape[shape.index(-1)] = x.values.numel() // known
    if torch.Size(shape).numel() != x.values.numel():
        return None
    names, j = "", 0
    old, dims = list(x.values.shape), x.dims
    place = 0
    while place < len(dims):
        if dims[place] == "S":
            while j < len(shape) and shape[j] == 1 != old[place] and j != at:
                names, j = names + "C", j + 1
            if j >= len(shape) or shape[j] != old[place] or (at is not None and at != j):
                return None
            names, place, j = names + "S", place + 1, j + 1
            continue
        start = place
        while place < len(dims) and dims[place] != "S":
            place += 1
        run, product, first = torch.Size(old[start:place]).numel(), 1, j
        while product < run:
            if j >= len(shape):
                return None
            product, j = product * shape[j], j + 1
        if product != run:
            return None
        if "B" in dims[start:place] and j > first and shape[first] == old[start] and dims[start] == "B":
            names += "B" + "C" * (j - first - 1)
        elif run == 1 and dims[start:place] == "B":  # one image
            if j < len(shape) and shape[j] == 1:
                names, j = names + "B", j + 1
        else:
            names += "C" * (j - first)
    if any(n != 1 for n in shape[j:]):
        return None
    return names + "C" * (len(shape) - j), shape


def _along(func: Callable) -> Callable:
    """A reduction: over pixels it covers the active ones."""

    def reduce(input, dim=None, keepdim=False, **kwargs):
        if dim is None:
            raise SparseOpError(f"{name_of(func)}{where()} over everything mixes images")
        places = {place_of(name_of(func), input, d) for d in ((dim,) if isinstance(dim, int) else dim)}
        if any(input.dims[p] == "B" for p in places):
            raise SparseOpError(f"{name_of(func)}{where()} over the batch has no sparse meaning")
        out = func(input.values, dim, keepdim=keepdim, **kwargs)
        names = enumerate(input.dims)
        dims = "".join(("C" if p in places else n) for p, n in names if keepdim or p not in places)
        return input.like(out, dims)

    return reduce


for _function in named("mean sum amax amin logsumexp", torch, torch.Tensor):
    RULES[_function] = _along(_function)


@_rule(F.linear)
def _linear(input, weight, bias=None):
    if input.dims[-1] == "S":
        raise SparseOpError(f"linear{where()} over the pixels: a weight for each pixel has no sparse meaning")
    return input.like(F.linear(input.values, weight, bias), input.dims)


@_rule(F.layer_norm, torch.layer_norm)
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    if "S" in input.dims[-len(normalized_shape) :]:
        raise SparseOpError(f"layer_norm{where()} over the pixels has no sparse meaning")
    return input.like(F.layer_norm(input.values, normalized_shape, weight, bias, eps), input.dims)


def _pieces(function: Callable) -> Callable:
    def split(input, *args, dim=0, **size):
        (size, *dims) = (*args, *size.values())
        dim = place_of(name_of(function), input, dims[0] if dims else dim)
        if input.dims[dim] != "C":
            raise SparseOpError(f"{name_of(function)}{where()}: only channels; got dim={dim} of {input.dims}")
        return tuple(input.like(piece, input.dims) for piece in function(input.values, size, dim=dim))

    return split


for _function in named("split chunk tensor_split", torch, torch.Tensor):
    RULES[_function] = _pieces(_function)


@_rule(*named("unbind", torch, torch.Tensor))
def _unbind(input, dim=0):
    place = place_of("unbind", input, dim)
    if input.dims[place] != "C":
        raise SparseOpError(f"unbind{where()}: only channels; got dim={dim} of {input.dims}")
    dims = input.dims[:place] + input.dims[place + 1 :]
    return tuple(input.like(piece, dims) for piece in input.values.unbind(place))


@_rule(torch.Tensor.__getitem__)
def _getitem(input, index):
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        place = next(n for n, i in enumerate(index) if i is Ellipsis)
        index = index[:place] + (slice(None),) * (len(input.dims) + 1 - len(index)) + index[place + 1 :]
    dims = ""
    for name, i in zip(input.dims, (*index, *[slice(None)] * (len(input.dims) - len(index))), strict=True):
        number = isinstance(i, int) and not isinstance(i, bool)
        if not (isinstance(i, slice) and (name == "C" or i == slice(None))) and not (number and name == "C"):
            raise SparseOpError(
                f"indexing{where()}: only channels of a sequence, by numbers and slices; got {index} of {input.dims}"
            )
        dims += "" if number else name
    return input.like(input.values[index], dims)


@_rule(torch.Tensor.type_as)
def _type_as(input, other):
    return input.like(input.values.type_as(_plain(other)), input.dims)


@_rule(torch.Tensor.to)
def _to(input, *args, **kwargs):
    return input.like(input.values.to(*args, **kwargs), input.dims)
