"""Access to the compiled CPU module: loading it, and describing a geometry to it."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from spark_fast.ops.window import Geometry


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why `spark_fast._native` cannot be used, or None."""
    try:
        module()
    except ImportError as error:
        return (
            f"the compiled module spark_fast._native does not load ({error}); reinstall with `pip install .`. In a "
            "source checkout, whose folder hides the installed package, use `pip install -e .` or leave the folder"
        )
    return None


def module() -> ModuleType:
    from spark_fast import _native

    return _native


def geometry_args(geometry: Geometry, transposed: bool = False) -> tuple[tuple, tuple]:
    """The geometry as addresses and sizes, and the tensors to keep alive meanwhile. Forward the query rows are the
    output's; transposed they are the input's."""
    tables = geometry.axis_tables(transposed)
    y_grid, y_in, x_grid, x_in = (t.ctypes.data for t in tables)
    query, source, sizes = geometry.query, geometry.source, (geometry.patch_out, geometry.patch_in)
    check_plain(query.coords, source.coords)
    length_y, length_x = geometry.size_out
    if transposed:
        query, source, sizes = source, query, sizes[::-1]
        length_y, length_x = geometry.size_in
    args = (
        query.coords.data_ptr(), query.count, *sizes[0], *sizes[1], source.grid_to_patch.data_ptr(), *source.grid,
        *geometry.window.kernel, y_grid, y_in, length_y, x_grid, x_in, length_x,
    )  # fmt: skip
    return args, (tables, query, source)


def computing(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors contiguous and in the kernels' type: double stays, everything else is float32.

    Raises:
        TypeError: a tensor subclass, such as a FakeTensor, which has no memory that a kernel could read.
    """
    check_plain(*tensors)
    first = next(t for t in tensors if t is not None)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return tuple(None if t is None else t.to(dtype).contiguous().resolve_neg() for t in tensors)


def check_plain(*tensors: torch.Tensor | None) -> None:
    """Raises TypeError for a tensor subclass, such as a FakeTensor, which has no memory that a kernel could read."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"the compiled CPU kernels need plain tensors; got {type(tensor).__name__}")


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
