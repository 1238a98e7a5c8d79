"""SparseTensor: a batch of masked feature maps, of which only the active pixels exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spark_fast.ops.checks import check_rows
from spark_fast.ops.densify import gather_patches, scatter_patches
from spark_fast.patches import ActivePatches

if TYPE_CHECKING:
    from spark_fast.fusion import Fusion


class SparseMap:
    """What `SparseTensor` and `rules.views.SparseView` share: rows of the active pixels that answer as a dense batch.

    `features` is (N, *channels): one row for each active pixel, with any number of channel dimensions. `dims` names the
    dimensions of the batch that they stand for: B, H and W once, C for each channel dimension of `features`, in order.
    """

    __slots__ = ("features", "fusion", "patches", "side")

    features: torch.Tensor
    patches: ActivePatches
    side: int
    dims: str
    fusion: Fusion | None  # of the run of an encoder that this is a map of

    @property
    def shape(self) -> torch.Size:
        gh, gw = self.patches.grid
        sizes = {"B": self.patches.batch, "H": gh * self.side, "W": gw * self.side}
        channels = iter(self._like.shape[1:])
        return torch.Size(sizes[d] if d in sizes else next(channels) for d in self.dims)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.dims)

    ndim = property(lambda self: self.dim())

    def numel(self) -> int:
        """Elements that exist, those of active pixels: what a sum over space is divided by for a mean."""
        return self._like.numel()

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        return self.features.is_contiguous()

    def is_floating_point(self) -> bool:
        return self._like.is_floating_point()

    def is_complex(self) -> bool:
        return False

    # What a module may ask of its input that the rows answer.
    _like = property(lambda self: self.features)  # or what is as large, of the same type and in the same place
    dtype = property(lambda self: self._like.dtype)
    device = property(lambda self: self._like.device)
    requires_grad = property(lambda self: self.features.requires_grad)
    data = property(lambda self: self.with_features(self.features.data))
    is_cuda = property(lambda self: self._like.is_cuda)
    is_leaf = property(lambda self: self.features.is_leaf)
    is_quantized = False
    is_sparse = False
    is_nested = False
    is_mkldnn = False

    def new_empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.features.new_empty(*args, **kwargs)

    def new_zeros(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.features.new_zeros(*args, **kwargs)

    def new_ones(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.features.new_ones(*args, **kwargs)

    def new_full(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.features.new_full(*args, **kwargs)

    def new_tensor(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.features.new_tensor(*args, **kwargs)

    __hash__ = object.__hash__  # by identity; == is an operation on values

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        from spark_fast.rules import apply

        return apply(func, args, kwargs or {})

    def __getattr__(self, name: str):
        method = None if name.startswith("__") else getattr(torch.Tensor, name, None)
        if not callable(method):
            raise AttributeError(
                f"SparseTensor has no attribute {name!r}; .features holds the rows, .to_dense() gives the dense map"
            )
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)


class SparseTensor(SparseMap):
    """An image batch (B, C, gh * side, gw * side) that stores the rows of its active patches only.

    It implements `__torch_function__`: functions and methods of PyTorch that have a sparse rule (`spark_fast.rules`)
    work on it, so an unmodified `nn.Module` written for (B, C, H, W) runs on it. All others raise `SparseOpError` or,
    where that is exact, run on the dense map with one warning. Autograd works through `features`.

    Args:
        features: (P * side * side, C) rows, patch-major, row-major inside a patch, floating point.
        patches: the P active patches.
        side: a patch's side in pixels of this map.
        channels_last: the logical order of dimensions is (B, H, W, C), as after `permute(0, 2, 3, 1)`.

    Raises:
        TypeError, ValueError: the rows do not fit the patches.
    """

    __slots__ = ("__weakref__", "_features", "_pending", "channels_last")

    def __init__(self, features: torch.Tensor, patches: ActivePatches, side: int, channels_last: bool = False):
        if not isinstance(side, int) or side < 1:
            raise ValueError(f"side is a patch's side in pixels, a whole number of at least 1; got {side!r}")
        check_rows("SparseTensor", features, patches, side)
        self.features = features
        self.patches = patches
        self.side = side
        self.channels_last = channels_last
        self.fusion = None

    @property
    def features(self) -> torch.Tensor:
        self.settle()
        return self._features

    @features.setter
    def features(self, rows: torch.Tensor) -> None:
        self._features, self._pending = rows, None

    def settle(self) -> None:
        """Computes the rows, if they are pending (`spark_fast.fusion`)."""
        if self._pending is not None:
            self.features = self._pending.rows()

    @property
    def _like(self) -> torch.Tensor:
        return self._features

    @classmethod
    def from_dense(cls, images: torch.Tensor, patches: ActivePatches) -> SparseTensor:
        """The active patches of `images` (B, C, H, W). Masked pixels are not read: they may be NaN.

        Raises:
            TypeError, ValueError: `images` do not fit `patches`.
        """
        features = gather_patches(images, patches)
        return cls(features, patches, images.shape[2] // patches.grid[0])

    @classmethod
    def from_coords(cls, features: torch.Tensor, coords: torch.Tensor, shape: tuple[int, int, int]) -> SparseTensor:
        """Any set of pixels: the general 2D submanifold case, as patches of one pixel each. Waits for a GPU once.

        Rows are kept sorted by (image, row, column), whatever the order of `coords`; gradients reach `features` in
        the caller's order, and `features_at(coords)` gives rows in it.

        Args:
            features: (N, C), floating point; row i belongs to the pixel coords[i].
            coords: integer (N, 3), image, row and column of each pixel, on the features' device.
            shape: images, rows and columns: (B, H, W). Images may have no pixel, and there may be no image.

        Raises:
            TypeError, ValueError: an argument does not fit the others, a pixel lies outside `shape` or is given twice;
                the message names it.
        """
        if not isinstance(features, torch.Tensor):
            raise TypeError(f"features must be a tensor (N, C); got {type(features).__name__}")
        if isinstance(coords, torch.Tensor) and features.dim() == 2 and features.shape[:1] != coords.shape[:1]:
            raise ValueError(f"features and coords must have a row for each pixel; got {len(features)}, {len(coords)}")
        if isinstance(coords, torch.Tensor) and features.device != coords.device:
            raise ValueError(f"features are on {features.device}, coords on {coords.device}; move one with .to()")
        patches, places = ActivePatches.of_coords(coords, shape)
        check_rows("from_coords", features, patches, 1)
        return cls(_reordered(features, places), patches, 1)

    @property
    def coords(self) -> torch.Tensor:
        """Image, row and column of each row, in their order: int32 (rows, 3)."""
        return self.patches.pixel_coords(self.side)

    def features_at(self, coords: torch.Tensor) -> torch.Tensor:
        """The features (N, C) of the active pixels at `coords`, in the order of `coords`. Waits for a GPU once.

        Args:
            coords: integer (N, 3), image, row and column, on the tensor's device; a pixel may come twice.

        Raises:
            TypeError, ValueError: `coords` is no such tensor, or a pixel is not active.
        """
        return self.features[self.patches.rows_at(coords, self.side)]

    def to_pixels(self) -> SparseTensor:
        """The same pixels as patches of one pixel each, rows sorted by (image, row, column); itself where it is so."""
        if self.side == 1:
            return self
        patches, places = self.patches.pixels(self.side)
        return self.with_features(_reordered(self.features, places), 1, patches)

    def to_dense(self, fill: float | torch.Tensor = 0.0) -> torch.Tensor:
        """The dense map, (B, C, H, W) or, for a channels-last tensor, (B, H, W, C).

        Args:
            fill: value of the masked pixels: a number, or (C,), differentiable.
        """
        if not isinstance(fill, torch.Tensor):
            fill = None if fill == 0 else self.features.new_full((self.features.shape[1],), fill)
        dense = scatter_patches(self.features, self.patches, self.side, fill)
        return dense.permute(0, 2, 3, 1) if self.channels_last else dense

    def with_features(
        self, features: torch.Tensor, side: int | None = None, patches: ActivePatches | None = None
    ) -> SparseTensor:
        """Other rows, on the same patches unless others are given: (P * side * side, any C)."""
        patches = self.patches if patches is None else patches
        out = SparseTensor(features, patches, self.side if side is None else side, self.channels_last)
        out.fusion = self.fusion
        return out

    @property
    def dims(self) -> str:
        return "BHWC" if self.channels_last else "BCHW"

    def __repr__(self) -> str:
        return (
            f"SparseTensor(shape={tuple(self.shape)}, side={self.side}, rows={self.features.shape[0]}, "
            f"dtype={self.dtype}, patches={self.patches})"
        )


def _reordered(features: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Row i of `features` as row places[i]; `places` is a permutation."""
    return features.new_empty(features.shape).index_copy(0, places, features)


def _operator(name: str):
    method = getattr(torch.Tensor, name)

    def call(self, *args):
        return self.__torch_function__(method, (), (self, *args))

    call.__name__ = name
    return call


# Python looks operators up on the class, so that __getattr__ does not see them.
_OPERATORS = (
    "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__",
    "__truediv__", "__rtruediv__", "__itruediv__", "__pow__", "__rpow__", "__neg__", "__abs__", "__eq__", "__ne__",
    "__lt__", "__le__", "__gt__", "__ge__", "__getitem__", "__setitem__", "__matmul__", "__floordiv__", "__mod__",
    "__bool__", "__float__", "__int__", "__iter__", "__and__", "__or__", "__invert__",
)  # fmt: skip
for _name in _OPERATORS:
    setattr(SparseMap, _name, _operator(_name))
