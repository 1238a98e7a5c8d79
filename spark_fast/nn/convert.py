"""Swapping dense layers for sparse ones, in place."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TypeVar

from torch import nn

from spark_fast.nn import modules

SPARSE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: modules.SparseConv2d,
    nn.ConvTranspose2d: modules.SparseConvTranspose2d,
    nn.MaxPool2d: modules.SparseMaxPool2d,
    nn.AvgPool2d: modules.SparseAvgPool2d,
    nn.BatchNorm2d: modules.SparseBatchNorm2d,
    nn.SyncBatchNorm: modules.SparseSyncBatchNorm,
    nn.LayerNorm: modules.SparseLayerNorm,
}
DENSE = {sparse: dense for dense, sparse in SPARSE.items()}

Model = TypeVar("Model", bound=nn.Module)


def to_sparse(model: Model) -> Model:
    """Makes each nn.Conv2d, nn.ConvTranspose2d, pooling, batch norm, SyncBatchNorm and layer norm of `model` its
    `spark_fast.nn` sibling.

    The modules keep their identity: parameters, buffers, hooks, names and state dict stay as they are; only the class
    changes. Subclasses are left alone: PyTorch's and timm's work on a SparseTensor as they are, through the functions
    they call; one warning lists any other. Returns `model`, changed in place. Calling it again changes nothing.

    Raises:
        TypeError: `model` is not a module.
    """
    _swap(model, SPARSE)
    foreign = Counter(
        type(m).__qualname__
        for m in model.modules()
        if isinstance(m, tuple(SPARSE)) and type(m).__module__.split(".")[0] not in ("torch", "timm", "spark_fast")
    )
    if foreign:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(foreign.items()))
        warnings.warn(
            f"to_sparse left subclasses of dense layers as they are: {names}. On a SparseTensor their own forward runs",
            stacklevel=2,
        )
    return model


def to_dense(model: Model) -> Model:
    """The reverse of `to_sparse`, in place. Returns `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    _swap(model, DENSE)
    return model


def _swap(model: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    for module in model.modules():
        if type(module) in table:
            module.__class__ = table[type(module)]
