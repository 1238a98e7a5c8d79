"""To and from spconv's 2D sparse tensors, where spconv is installed (`pip install spconv`, or spconv-cu126 and so on).

The same sets of pixels: what spconv calls SubMConv2d is `SparseConv2d` of stride 1, its SparseConv2d is
`SparseConv2d(output="dilated")`, its SparseInverseConv2d is `SparseConvTranspose2d` called with `output=`.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch

from spark_fast.tensor import SparseTensor

if TYPE_CHECKING:
    from spconv.pytorch import SparseConvTensor


def from_spconv(tensor: SparseConvTensor) -> SparseTensor:
    """A 2D SparseConvTensor as patches of one pixel each, rows sorted by (image, row, column); differentiable. Waits
    for a GPU once.

    `features_at(tensor.indices)` of the result, and of what is computed on its pixels, has spconv's order.

    Raises:
        ImportError: spconv is not installed.
        TypeError, ValueError: `tensor` is not a SparseConvTensor, not 2D, or holds a pixel twice.
    """
    if not isinstance(tensor, _spconv().SparseConvTensor):
        raise TypeError(f"tensor must be a spconv.pytorch.SparseConvTensor; got {type(tensor).__name__}")
    if len(tensor.spatial_shape) != 2:
        raise ValueError(f"tensor must be 2D; its spatial_shape is {list(tensor.spatial_shape)}")
    shape = (tensor.batch_size, *tensor.spatial_shape)
    return SparseTensor.from_coords(tensor.features, tensor.indices, tuple(int(size) for size in shape))


def to_spconv(x: SparseTensor) -> SparseConvTensor:
    """The active pixels of `x` as a SparseConvTensor, in the order of its rows; differentiable.

    Raises:
        ImportError: spconv is not installed.
        TypeError: `x` is not a SparseTensor.
    """
    if not isinstance(x, SparseTensor):
        raise TypeError(f"x must be a SparseTensor; got {type(x).__name__}")
    size = [cells * x.side for cells in x.patches.grid]
    return _spconv().SparseConvTensor(x.features, x.coords, size, x.patches.batch)


def weight_from_spconv(weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """The weight of a spconv 2D layer, (O, kh, kw, C), as nn.Conv2d's, (O, C, kh, kw); of an inverse convolution, with
    `transposed`, as nn.ConvTranspose2d's, (C, O, kh, kw).

    Raises:
        ValueError: `weight` does not have four dimensions.
    """
    _check_weight(weight)
    return weight.permute((3, 0, 1, 2) if transposed else (0, 3, 1, 2)).contiguous()


def weight_to_spconv(weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """The reverse of `weight_from_spconv`.

    Raises:
        ValueError: `weight` does not have four dimensions.
    """
    _check_weight(weight)
    return weight.permute((1, 2, 3, 0) if transposed else (0, 2, 3, 1)).contiguous()


def _check_weight(weight: torch.Tensor) -> None:
    if weight.dim() != 4:
        raise ValueError(f"weight must be of a 2D convolution, of four dimensions; got shape {tuple(weight.shape)}")


def _spconv() -> ModuleType:
    try:
        import spconv.pytorch as spconv
    except ImportError as error:
        raise ImportError(
            f"spconv does not load ({error}); `pip install spconv`, or spconv-cu126 and so on for a GPU"
        ) from error
    return spconv
