"""Operations that models call one by one, as one kernel: batch norm, shortcut, activation; linear, GELU, linear; layer
scale and shortcut.

While an encoder runs and gradients are recorded, the result of a batch norm is pending: its statistics are known and
the running ones updated, but its rows are computed only when something reads them. A shortcut that is added to it and
an activation become part of that computation (`spark_fast.ops.norm.batch_apply`); anything else finds the rows. A
linear map is pending too, and with a GELU and another linear map after it an MLP (`spark_fast.ops.mlp`). So is a
product with a vector of the channels, which a shortcut can join (`spark_fast.ops.norm.layer_scale`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from spark_fast.ops.checks import autocast
from spark_fast.ops.linear import checked_linear, linear
from spark_fast.ops.mlp import mlp
from spark_fast.ops.norm import batch_apply, batch_norm, batch_statistics, layer_scale
from spark_fast.ops.norm.api import check_batch_norm
from spark_fast.tensor import SparseTensor

ACTIVATIONS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", torch.Tensor.relu: "relu",
    torch.Tensor.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
}  # fmt: skip
PRODUCTS = {torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__}
IN_PLACE = {F.relu_, torch.relu_, torch.Tensor.relu_, torch.Tensor.add_, torch.Tensor.__iadd__}
# Functions that write to no map: pending results may wait for them.
READERS = {
    torch.conv2d, F.conv2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d, torch._C._nn.avg_pool2d, F.batch_norm,
    F.linear,
}  # fmt: skip


@dataclass(frozen=True)
class Pending:
    """Rows that are not computed yet, and what of. `like` has their shape, dtype and device."""

    def __post_init__(self):
        object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> list[tuple[int, int]]:
        """Of each tensor; writes through `.data` count no version, but another tensor as `.data` is another address."""
        return [(t._version, t.data_ptr()) for t in vars(self).values() if isinstance(t, torch.Tensor)]

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a tensor that the rows depend on was written to, but by no function of a sparse tensor.
        """
        if self._versions() != self.versions:
            raise RuntimeError(
                f"{self.name} of a SparseTensor: its input, weight, bias or shortcut was changed in place before the "
                "result was read. Read the result before (its .features), change a clone, or set encoder.fuse = False"
            )

    def but(self, **changes) -> Pending:
        self.check()
        return replace(self, **changes)

    def rows(self) -> torch.Tensor:
        """The rows, with gradients whatever the mode of who reads them."""
        self.check()
        plain = torch.autocast(self.features.device.type, enabled=False)  # who called the operation has cast for it
        with torch.inference_mode(False), torch.enable_grad(), plain, _own_hooks():
            return self.compute()


@dataclass(frozen=True)
class PendingNorm(Pending):
    """The arguments of `batch_apply`."""

    features: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor
    training: bool
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    activation: str | None = None
    residual: torch.Tensor | None = None

    name = "batch norm"

    @property
    def like(self) -> torch.Tensor:
        return self.features

    def compute(self) -> torch.Tensor:
        return batch_apply(
            self.features, self.mean, self.rstd, self.training, self.weight, self.bias, self.activation, self.residual
        )


@dataclass(frozen=True)
class PendingLinear(Pending):
    """The arguments of `linear`, and whether a GELU follows."""

    features: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    gelu: bool = False

    name = "linear"

    @property
    def like(self) -> torch.Tensor:
        return self.features.new_empty(()).expand(self.features.shape[0], self.weight.shape[0])

    def compute(self) -> torch.Tensor:
        rows = linear(self.features, self.weight, self.bias)
        return F.gelu(rows) if self.gelu else rows


@dataclass(frozen=True)
class PendingScale(Pending):
    """The arguments of `layer_scale`."""

    features: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor | None = None

    name = "layer scale"

    @property
    def like(self) -> torch.Tensor:
        dtype = torch.promote_types(self.features.dtype, self.weight.dtype)
        return self.features.new_empty((), dtype=dtype).expand(self.features.shape)

    def compute(self) -> torch.Tensor:
        return layer_scale(self.features, self.weight, self.residual)


class Fusion:
    """What the sparse tensors of one run of an encoder share. Results become pending while it is open."""

    def __init__(self):
        self.open = True
        self._pending: list[weakref.ref[SparseTensor]] = []

    def defer(self, pending: Pending, x: SparseTensor) -> SparseTensor:
        """A tensor of the rows of `pending` on the patches of `x`."""
        out = x.with_features(pending.like)
        out._pending = pending
        self._pending = [known for known in self._pending if (x := known()) is not None and x._pending is not None]
        self._pending.append(weakref.ref(out))
        return out

    def settle(self) -> None:
        """Computes what is pending and can still be read."""
        for known in self._pending:
            if (x := known()) is not None:
                x.settle()
        self._pending = []

    def __getstate__(self) -> dict:
        """Of a copy: a run that is over."""
        return {"open": False, "_pending": []}


def batch_norm_of(
    x: SparseTensor, running_mean, running_var, weight, bias, training: bool, momentum: float, eps: float
) -> SparseTensor:
    """`ops.norm.batch_norm` of the rows of `x`, pending if that is possible."""
    if not _can_wait(x, weight, bias):
        return x.with_features(batch_norm(x.features, running_mean, running_var, weight, bias, training, momentum, eps))
    check_batch_norm("batch_norm", x.features, running_mean, running_var, weight, bias, training)
    statistics = batch_statistics(x.features, running_mean, running_var, training, momentum, eps)
    return x.fusion.defer(PendingNorm(x.features, *statistics, training, weight, bias), x)


def linear_of(x: SparseTensor, weight: torch.Tensor, bias: torch.Tensor | None) -> SparseTensor:
    """`ops.linear.linear` of the rows of `x`, pending if that is possible; of a pending GELU, the end of an MLP."""
    if not _can_wait(x, weight, bias):
        return x.with_features(linear(x.features, weight, bias))
    first = x._pending
    if isinstance(first, PendingLinear) and first.gelu and _is_cast(first.features):
        first.check()
        return x.with_features(mlp(first.features, first.weight, first.bias, weight, bias))
    return x.fusion.defer(PendingLinear(*checked_linear(x.features, weight, bias)), x)


def _can_wait(x: SparseTensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
    """Not without gradients, where a model may write to its maps afterwards; not in a region that the backward computes
    again, which must save the same tensors then."""
    if x.fusion is None or not x.fusion.open or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    known = x._pending is not None or any(t is not None and t.requires_grad for t in (x._features, weight, bias))
    return known and _hooks() is None


def fuse(func: Callable, args: tuple, kwargs: dict) -> SparseTensor | None:
    """What `func` gives as a part of a pending operation, itself pending if more can follow; None where it is none, as
    without gradients or in a region that is computed again while the pending operation is from outside of it."""
    if not torch.is_grad_enabled() or _hooks() is not None:
        return None
    if func in ACTIVATIONS:
        return _activated(func, ACTIVATIONS[func], *args, **kwargs)
    if func is F.hardtanh:  # nn.ReLU6
        return _hardtanh(*args, **kwargs)
    if func is F.gelu:
        return _gelu(*args, **kwargs)
    if func is F.dropout:
        return _dropout(*args, **kwargs)
    if func in ADDITIONS and len(args) == 2 and not kwargs:
        return _added(func, *args)
    if func in PRODUCTS and len(args) == 2 and not kwargs:
        return _scaled(*args)
    return None


def _activated(func: Callable, name: str, input, inplace: bool = False) -> SparseTensor | None:
    if not _is_norm(input):
        return None
    rows = input._pending.but(activation=name).rows()
    if not (inplace or func in IN_PLACE):
        return input.with_features(rows)
    input.features = rows
    return input


def _hardtanh(input, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> SparseTensor | None:
    return _activated(F.hardtanh, "relu6", input, inplace) if (min_val, max_val) == (0, 6) else None


def _gelu(input, approximate: str = "none") -> SparseTensor | None:
    if not isinstance(input, SparseTensor) or not isinstance(input._pending, PendingLinear) or approximate != "none":
        return None
    return None if input._pending.gelu else input.fusion.defer(input._pending.but(gelu=True), input)


def _dropout(input, p: float = 0.5, training: bool = True, inplace: bool = False) -> SparseTensor | None:
    """That drops nothing, as between the linear maps of timm's MLPs."""
    pending = isinstance(input, SparseTensor) and input._pending is not None
    return input if pending and (p == 0 or not training) else None


def _added(func: Callable, a: object, b: object) -> SparseTensor | None:
    if not isinstance(a, SparseTensor) or not isinstance(b, SparseTensor) or a is b:
        return None
    if (a.patches, a.side, a.shape, a.dims, a.dtype) != (b.patches, b.side, b.shape, b.dims, b.dtype):
        return None
    if a.fusion is not b.fusion:  # a write to the shortcut would go unseen
        return None
    if _takes_shortcut(a):
        x, other = a, b
    elif _takes_shortcut(b) and func not in IN_PLACE:
        x, other = b, a
    else:
        return None
    total = x._pending.but(residual=other.features)
    if func not in IN_PLACE:
        return x.fusion.defer(total, x)
    x._pending = total
    return x


def _takes_shortcut(x: SparseTensor) -> bool:
    return isinstance(x._pending, PendingNorm | PendingScale) and x._pending.residual is None


def _scaled(a: object, b: object) -> SparseTensor | None:
    x, weight = (a, b) if isinstance(a, SparseTensor) else (b, a)
    if not isinstance(x, SparseTensor) or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if not weight.requires_grad or weight.dim() == 0:  # a constant keeps no map; a number promotes no dtype
        return None
    of_channels = (1, 1, 1, x.shape[3]) if x.channels_last else (1, x.shape[1], 1, 1)
    if (1,) * (4 - weight.dim()) + tuple(weight.shape) != of_channels or not _can_wait(x, weight, None):
        return None
    return x.fusion.defer(PendingScale(x.features, weight.flatten()), x)


def _is_norm(x: object) -> bool:
    return isinstance(x, SparseTensor) and isinstance(x._pending, PendingNorm)


def _is_cast(rows: torch.Tensor) -> bool:
    """Autocast, which may be another than when they were made, leaves them as they are."""
    return autocast(rows.new_empty(0))[0].dtype == rows.dtype


def _hooks():
    """Those on saved tensors, by which regions are computed again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _own_hooks():
    """None: a pending result is from outside of such a region, also if it is read in one."""
    return nullcontext() if _hooks() is None else torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
