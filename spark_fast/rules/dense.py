"""Functions that run on the dense, zero-filled map and are masked again.

That is exact for functions of a pixel's neighbourhood: masked pixels are zeros to them, as they are in the dense
simulation of the method. It skips nothing, hence a warning.
"""

from __future__ import annotations

from collections.abc import Callable

from spark_fast.rules.pointwise import common
from spark_fast.rules.registry import named, warn_dense
from spark_fast.rules.views import plain
from spark_fast.tensor import SparseMap, SparseTensor

LOCAL = frozenset(named("lp_pool2d local_response_norm grid_sample upsample_bilinear"))


def through_dense(func: Callable, args: tuple, kwargs: dict) -> SparseTensor:
    like = common(func, args + tuple(kwargs.values()))
    plain(func.__name__, like)
    warn_dense(func)
    dense = [a.to_dense() if isinstance(a, SparseMap) else a for a in args]
    out = func(*dense, **{k: v.to_dense() if isinstance(v, SparseMap) else v for k, v in kwargs.items()})
    return SparseTensor.from_dense(out, like.patches)
