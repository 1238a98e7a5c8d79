"""Windows: kernel, stride, padding and dilation, and which input pixel an output pixel reads.

Per axis, output coordinate o reads input coordinate `o * stride - padding + k * dilation` at tap k. All window ops
(convolution, depthwise, pooling) and all their gradients use the tables made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from spark_fast.patches import ActivePatches

MASKED = -1  # inside the image, but not active
OUTSIDE = -2  # beyond the image border (or, transposed: no output reads the pixel through this tap)


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """`value` as (rows, columns)."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) == 1:
        both *= 2
    if len(both) != 2 or not all(isinstance(v, int) for v in both):
        raise ValueError(f"{name} must be an integer or a pair of integers; got {value!r}")
    return both


def padding_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """The argument `padding` of an op as (rows, columns).

    Raises:
        ValueError: it is negative, or no integers.
    """
    both = pair(value, "padding")
    if min(both) < 0:
        raise ValueError(f"padding must be at least 0; got {value!r}")
    return both


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding and dilation of a window op, each (rows, columns).

    `padding` is that of both ends, to which `extra` adds at the end: TensorFlow's "same". A negative one crops.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    extra: tuple[int, int] = (0, 0)

    def __post_init__(self):
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    @property
    def is_symmetric(self) -> bool:
        """Does PyTorch's own `padding` argument say it?"""
        return self.extra == (0, 0)

    def padded(self, top: int, bottom: int, left: int, right: int) -> Window:
        """This window on a map padded so before."""
        extra = self.extra[0] + bottom - top, self.extra[1] + right - left
        return replace(self, padding=(self.padding[0] + top, self.padding[1] + left), extra=extra)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def out_size(self, size: tuple[int, int], ceil_mode: bool = False) -> tuple[int, int]:
        """Output height and width for an input of (height, width), as PyTorch computes them."""
        return tuple(self._out_length(axis, size[axis], ceil_mode) for axis in (0, 1))

    def _out_length(self, axis: int, length: int, ceil_mode: bool) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        reach = length + 2 * padding + self.extra[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        out = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
        if ceil_mode and (out - 1) * stride >= length + padding:
            out -= 1  # the last window must start inside the image or its left padding
        return out


@lru_cache(maxsize=4096)
def axis_table(
    window: Window, axis: int, in_length: int, out_length: int, side: int, transposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """For one axis: the source coordinate of each (tap, query coordinate), split into patch and offset in the patch.

    Forward, the query is an output coordinate and the source an input coordinate. Transposed, the query is an input
    coordinate and the source the one output coordinate that reads it through this tap. `side` is the source's.

    Returns:
        int32 (kernel, query length) twice: grid coordinate, OUTSIDE where there is none; and offset in the patch.
    """
    stride, padding, dilation = window.stride[axis], window.padding[axis], window.dilation[axis]
    tap = np.arange(window.kernel[axis])[:, None] * dilation  # (k, 1)
    if transposed:
        scaled = np.arange(in_length)[None] + padding - tap
        source, exists = scaled // stride, scaled % stride == 0
        exists &= (source >= 0) & (source < out_length)
    else:
        source = np.arange(out_length)[None] * stride - padding + tap
        exists = (source >= 0) & (source < in_length)
    grid, offset = np.where(exists, source // side, OUTSIDE), np.where(exists, source % side, 0)
    tables = grid.astype(np.int32), offset.astype(np.int32)
    for table in tables:
        table.flags.writeable = False  # the cache hands the same arrays to everyone
    return tables


_whole: dict[tuple[int, torch.device], ActivePatches] = {}


def new_whole_images(batch: int, device: torch.device) -> ActivePatches:
    """A dense batch as patches: each image is one active patch, so that its pixels in order are its rows."""
    numbers = torch.arange(batch, dtype=torch.int32, device=device)
    coords = torch.nn.functional.pad(numbers[:, None], (0, 2))
    return ActivePatches.from_tables(coords, numbers.view(batch, 1, 1), per_image=1)


def whole_images(batch: int, device: torch.device) -> ActivePatches:
    """The same, kept for later calls."""
    found = _whole.get((batch, device))
    if found is None:
        found = ActivePatches(torch.ones(batch, 1, 1, dtype=torch.bool, device=device), per_image=1)
        # What is made under FakeTensorMode or inference_mode is of no use outside, and what a CUDA graph makes has no
        # values until it is replayed.
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if type(found.coords) is torch.Tensor and not found.coords.is_inference() and not captured:
            if device.type == "cpu" and len(_whole) >= 64:  # on a GPU a recorded graph may go on reading them
                _whole.clear()
            _whole[batch, device] = found
    return found


@dataclass(frozen=True)
class Geometry:
    """One window op on one batch: from the rows of `source` on maps of `size_in` (height, width) to those of `query` on
    maps of `size_out`. A patch is a map's size over the grid, in pixels."""

    source: ActivePatches
    query: ActivePatches
    window: Window
    size_in: tuple[int, int]
    size_out: tuple[int, int]

    @staticmethod
    def of(patches: ActivePatches, side: int, window: Window, ceil_mode: bool = False, op: str = "op") -> Geometry:
        """The geometry of `window` on the rows of `patches` at `side`.

        Raises:
            ValueError: the output map is not a whole number of pixels per patch.
        """
        gh, gw = patches.grid
        height, width = window.out_size((gh * side, gw * side), ceil_mode)
        if height < 1 or width < 1:
            raise ValueError(
                f"{op}: the kernel {window.kernel} with dilation {window.dilation} is larger than the padded map "
                f"of {gh * side}x{gw * side} pixels"
            )
        if height % gh or width % gw or height // gh != width // gw:
            raise ValueError(
                f"{op}: kernel {window.kernel}, stride {window.stride}, padding {window.padding}, dilation "
                f"{window.dilation} turns a map of {gh * side}x{gw * side} pixels ({side} per patch side) into "
                f"{height}x{width}, which is not a whole number of pixels for each of the {gh}x{gw} patches. "
                "Use a patch_size that is a multiple of the network's total stride, and padding that keeps the size"
            )
        return Geometry(patches, patches, window, (gh * side, gw * side), (height, width))

    @staticmethod
    def dense(batch: int, size: tuple[int, int], window: Window, device: torch.device) -> Geometry:
        """The geometry of `window` on dense maps of `size`, whose rows are all pixels in order."""
        whole = whole_images(batch, device)
        return Geometry(whole, whole, window, size, window.out_size(size))

    @staticmethod
    def densifying(patches: ActivePatches, side: int, window: Window) -> Geometry:
        """The geometry of `window` from the rows of `patches` to all pixels, active or not."""
        size = (patches.grid[0] * side, patches.grid[1] * side)
        whole = whole_images(patches.batch, patches.device)
        return Geometry(patches, whole, window, size, window.out_size(size))

    @property
    def reversed(self) -> Geometry:
        """From `query` to `source`, through the same window."""
        return Geometry(self.query, self.source, self.window, self.size_out, self.size_in)

    @property
    def patches(self) -> ActivePatches:
        return self.source

    @property
    def patch_in(self) -> tuple[int, int]:
        return self.size_in[0] // self.source.grid[0], self.size_in[1] // self.source.grid[1]

    @property
    def patch_out(self) -> tuple[int, int]:
        return self.size_out[0] // self.query.grid[0], self.size_out[1] // self.query.grid[1]

    @property
    def side_in(self) -> int:
        return self.patch_in[0]

    @property
    def side_out(self) -> int:
        return self.patch_out[0]

    @property
    def rows_in(self) -> int:
        return self.source.count * self.patch_in[0] * self.patch_in[1]

    @property
    def rows_out(self) -> int:
        return self.query.count * self.patch_out[0] * self.patch_out[1]

    @property
    def is_pointwise(self) -> bool:
        """Output rows are the input rows: a 1x1 kernel with nothing to move."""
        return self.source is self.query and self.window == Window((1, 1), dilation=self.window.dilation)

    def axis_tables(self, transposed: bool = False) -> tuple[np.ndarray, ...]:
        """(row grid, row offset, column grid, column offset), see `axis_table`."""
        sides = self.patch_out if transposed else self.patch_in
        return sum(
            (
                axis_table(self.window, axis, self.size_in[axis], self.size_out[axis], sides[axis], transposed)
                for axis in (0, 1)
            ),
            (),
        )

    @cached_property
    def neighbors(self) -> torch.Tensor:
        """int64 (taps, rows_out): the input row that each output row reads, MASKED or OUTSIDE. For the reference
        and for tests; the kernels compute it as they go."""
        patches, side = self.query, self.side_out
        image, row, col = (i[:, None, None] for i in patches.index)  # (P, 1, 1)
        inside = torch.arange(side, device=patches.device)
        y = (row * side + inside[None, :, None]).expand(-1, -1, side).flatten()  # (N,)
        x = (col * side + inside[None, None, :]).expand(-1, side, -1).flatten()
        image = image.expand(-1, side, side).flatten()
        y_grid, y_in, x_grid, x_in = (
            torch.from_numpy(table.astype(np.int64)).to(patches.device) for table in self.axis_tables()
        )
        kh, kw = self.window.kernel
        y_grid, y_in = (t[:, y].repeat_interleave(kw, 0) for t in (y_grid, y_in))  # (taps, N)
        x_grid, x_in = (t[:, x].repeat(kh, 1) for t in (x_grid, x_in))
        patch = self.source.grid_to_patch[image, y_grid.clamp(min=0), x_grid.clamp(min=0)].long()
        found = (patch * self.side_in + y_in) * self.side_in + x_in
        found = torch.where(patch < 0, MASKED, found)
        return torch.where((y_grid < 0) | (x_grid < 0), OUTSIDE, found)
