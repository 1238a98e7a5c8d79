"""Functions that run on the dense, zero-filled map and are masked again.

That is exact for functions of a pixel's neighbourhood: masked pixels are zeros to them, as they are in the dense
simulation of the method. It skips nothing, hence a warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from spark_fast.rules.pointwise import common
from spark_fast.rules.registry import name_of, named, warn_dense, where
from spark_fast.rules.views import plain
from spark_fast.tensor import SparseMap, SparseTensor

LOCAL = frozenset(named("lp_pool2d local_response_norm upsample_bilinear"))
_notes: list[list[Fallback]] = []


class Fallback:
    """One run on the dense map: the operation with its module, and how long it took."""

    def __init__(self, operation: str, seconds: float):
        self.operation, self.seconds = operation, seconds


@contextmanager
def noted_fallbacks() -> Iterator[list[Fallback]]:
    """What runs on the dense map while the block runs (in this process)."""
    notes: list[Fallback] = []
    _notes.append(notes)
    try:
        yield notes
    finally:
        _notes.remove(notes)


def on_dense(op: str, like: SparseTensor, compute: Callable[[], torch.Tensor]) -> SparseTensor:
    """`compute()`, a dense map (B, C, H, W), masked again as `like` is."""
    if torch.compiler.is_compiling():
        return _masked(compute(), like)
    warn_dense(op)
    started = time.perf_counter()
    out = _masked(compute(), like)
    for notes in _notes:
        notes.append(Fallback(op + where(), time.perf_counter() - started))
    return out


def _masked(dense: torch.Tensor, like: SparseTensor) -> SparseTensor:
    return SparseTensor.from_dense(dense, like.patches.at(tuple(dense.shape[2:])))


def through_dense(func: Callable, args: tuple, kwargs: dict) -> SparseTensor:
    like = plain(name_of(func), common(func, args + tuple(kwargs.values())))

    def compute() -> torch.Tensor:
        dense = [a.to_dense() if isinstance(a, SparseMap) else a for a in args]
        return func(*dense, **{k: v.to_dense() if isinstance(v, SparseMap) else v for k, v in kwargs.items()})

    return on_dense(name_of(func), like, compute)
