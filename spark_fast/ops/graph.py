"""The ops as torch.compile sees them, shared part; each op's own are in `spark_fast/ops/<op>/graph.py`.

The backends take addresses, which a traced graph does not have. There an op is therefore one node, registered with
PyTorch as `spark_fast::<op>_<function>`: tensors and plain numbers in, tensors out, with a fake kernel that tells the
shapes, and gradients that are such nodes too. When a node runs, it calls the backend as the eager op does. The public
functions choose: `if torch.compiler.is_compiling()`, they call their op's graph.py.

Patches travel as their tables; a forced backend as its name, "" for none.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from spark_fast.ops import backend
from spark_fast.ops.window import Geometry, Window, new_whole_images
from spark_fast.patches import ActivePatches

# In schemas: how patches, and a window with its maps, are written.
TABLES = "Tensor coords, Tensor grid_to_patch, SymInt? per_image"
GEOMETRY = (
    "Tensor? coords, Tensor? grid_to_patch, SymInt? per_image, bool to_dense, SymInt[] size_in, SymInt[] size_out, "
    "int[] window"
)


def op(schema: str, fake: Callable) -> Callable:
    """Registers the decorated function as the op of this schema, "name(arguments) -> results", in `spark_fast::`.

    Args:
        fake: takes the same arguments; gives empty results of the right shape, dtype and strides.
    """
    name, arguments = schema.split("(", 1)

    def register(function: Callable) -> Callable:
        made = torch.library.custom_op(f"spark_fast::{name}", function, mutates_args=(), schema="(" + arguments)
        made.register_fake(fake)
        return made

    return register


def run(op: str, forced: str, first: torch.Tensor, *case: object) -> ModuleType:
    """The backend that runs `op`; `forced` is its name, or "" for the one that `backend.select` chooses for the case,
    whose first part is a tensor. Gradients give the case of their forward, so that the same backend runs."""
    with backend.forced_here(op, forced):
        return backend.select(op, first.device, first.dtype, first, *case)


def input_rows(grad: torch.Tensor, channels: int, where: tuple) -> torch.Tensor:
    """Stands for a window op's input rows, of which a gradient only knows what they look like; it has no memory."""
    return grad.new_empty(1, 1).expand(rows_in(*where), channels)


def tables(patches: ActivePatches) -> tuple:
    """`patches` as the arguments TABLES."""
    return patches.coords, patches.grid_to_patch, patches.per_image


def window_tables(geometry: Geometry) -> tuple:
    """A geometry from patches to the same patches as the arguments GEOMETRY."""
    size = (geometry.source.batch, *geometry.size_in)
    return *tables(geometry.source), False, size, geometry.size_out, numbers(geometry.window)


def dense_tables(source: ActivePatches | None, batch: int, size: tuple[int, int], window: Window) -> tuple:
    """A geometry from patches, or from dense maps of `size` (None), to dense maps as the arguments GEOMETRY."""
    given = (None, None, None) if source is None else tables(source)
    return *given, True, (batch, *size), window.out_size(size), numbers(window)


def numbers(window: Window) -> tuple[int, ...]:
    return *window.kernel, *window.stride, *window.padding, *window.dilation, *window.extra


def geometry(device: torch.device, coords, grid_to_patch, per_image, to_dense, size_in, size_out, window) -> Geometry:
    """Inverse of `window_tables` and `dense_tables`, when an op runs. Nothing made here outlives the op: a compiled
    graph may run in memory that is taken back after it (mode="reduce-overhead")."""
    batch, *size = size_in
    whole = new_whole_images(batch, device) if coords is None or to_dense else None
    source = whole if coords is None else ActivePatches.from_tables(coords, grid_to_patch, per_image)
    pairs = (tuple(window[i : i + 2]) for i in range(0, len(window), 2))
    return Geometry(source, whole if to_dense else source, Window(*pairs), tuple(size), tuple(size_out))


def rows_in(coords, grid_to_patch, per_image, to_dense, size_in, size_out, window) -> int:
    """Rows that the window op of these arguments reads."""
    return _rows(coords, grid_to_patch, *size_in)


def rows_out(coords, grid_to_patch, per_image, to_dense, size_in, size_out, window) -> int:
    """Rows that the window op of these arguments writes."""
    return _rows(None if to_dense else coords, grid_to_patch, size_in[0], *size_out)


def _rows(coords, grid_to_patch, batch: int, height: int, width: int) -> int:
    if coords is None:
        return batch * height * width
    return coords.shape[0] * (height // grid_to_patch.shape[1]) * (width // grid_to_patch.shape[2])
