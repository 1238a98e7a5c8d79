"""Where a function of PyTorch meets a sparse argument."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spark_fast.fusion import READERS, fuse
from spark_fast.rules.dense import LOCAL, through_dense
from spark_fast.rules.pointwise import POINTWISE, pointwise
from spark_fast.rules.registry import RULES, check_differentiable, refusal, usual_names
from spark_fast.tensor import SparseMap

# torch.compile hands over other objects than these, which are Python functions.
REFLECTED = {name: getattr(torch.Tensor, name) for name in ("__rsub__", "__rdiv__", "__rtruediv__", "__rpow__")}


def apply(func: Callable, args: tuple, kwargs: dict):
    """Runs `func` on arguments of which at least one is a SparseTensor or SparseView.

    Raises:
        SparseOpError: there is no rule.
    """
    check_differentiable()
    kwargs = usual_names(func, kwargs)
    fusion = next((x.fusion for x in (*args, *kwargs.values()) if isinstance(x, SparseMap) and x.fusion), None)
    if fusion is None:
        return _apply(func, args, kwargs)
    if func not in READERS:
        if func not in RULES and (fused := fuse(func, args, kwargs)) is not None:
            return fused
        fusion.settle()
    out = _apply(func, args, kwargs)
    if isinstance(out, SparseMap) and out.fusion is None:
        out.fusion = fusion
    return out


def _apply(func: Callable, args: tuple, kwargs: dict):
    if torch.compiler.is_compiling() and func.__name__ in REFLECTED:
        return pointwise(REFLECTED[func.__name__], args, kwargs)
    handler = RULES.get(func)
    if handler is not None:
        return handler(*args, **kwargs)
    if func in POINTWISE:
        return pointwise(func, args, kwargs)
    if func in LOCAL:
        return through_dense(func, args, kwargs)
    raise refusal(func)
