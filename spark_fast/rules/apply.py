"""Where a function of PyTorch meets a sparse argument."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spark_fast.rules.dense import LOCAL, through_dense
from spark_fast.rules.pointwise import POINTWISE, pointwise
from spark_fast.rules.registry import RULES, refusal


def apply(func: Callable, args: tuple, kwargs: dict):
    """Runs `func` on arguments of which at least one is a SparseTensor or SparseView.

    Raises:
        SparseOpError: there is no rule.
    """
    handler = RULES.get(func)
    if handler is not None:
        return handler(*args, **kwargs)
    if func in POINTWISE:
        return pointwise(func, args, kwargs)
    if func in LOCAL:
        return through_dense(func, args, kwargs)
    if torch.compiler.is_compiling():  # which hands over other objects for some reflected operators
        same = getattr(torch.Tensor, func.__name__, None)
        if same in POINTWISE:
            return pointwise(same, args, kwargs)
    raise refusal(func)
