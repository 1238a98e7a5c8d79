"""Swapping dense layers for sparse ones, in place."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

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
# Of PyTorch's quantisation, what computes in floating point.
FLOAT_MODULES = {"FloatFunctional", "FXFloatFunctional", "QuantStub", "DeQuantStub", "QuantWrapper"}

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool]


def to_sparse(model: Model, filter: Filter | None = None) -> Model:
    """Makes each nn.Conv2d, nn.ConvTranspose2d, pooling, batch norm, SyncBatchNorm and layer norm of `model` its
    `spark_fast.nn` sibling.

    The modules keep their identity: parameters, buffers, hooks, parametrisations, names and state dict stay as they
    are; only the class changes. Subclasses are left alone: PyTorch's and timm's work on a SparseTensor as they are,
    through the functions they call; one warning lists any other. Calling it again changes nothing.

    Args:
        model: changed in place.
        filter: `filter(name, module)` is asked for every module of `model`, under each of its names in
            `model.named_modules()`, and chooses those to swap. The others keep their classes.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module, `filter` is not callable, or a chosen module cannot be swapped: it is
            quantised, lazy with an unknown shape, or TorchScript. Then nothing is swapped.
        ValueError: `filter` chooses no layer that has a sparse sibling.
    """
    chosen = _chosen("to_sparse", model, filter)
    for name, module in chosen.items():
        reason = _refusal(module)
        if reason:
            raise TypeError(f"to_sparse: {name or 'the model'} ({type(module).__qualname__}) {reason}")
    _swap(chosen, SPARSE)
    kinds = (type_before_parametrizations(m) for m in chosen.values() if isinstance(m, tuple(SPARSE)))
    foreign = Counter(
        k.__qualname__ for k in kinds if k.__module__.split(".")[0] not in ("torch", "timm", "spark_fast")
    )
    if foreign:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(foreign.items()))
        warnings.warn(
            f"to_sparse left subclasses of dense layers as they are: {names}. On a SparseTensor their own forward runs",
            stacklevel=2,
        )
    return model


def to_dense(model: Model, filter: Filter | None = None) -> Model:
    """The reverse of `to_sparse`, in place, for all layers or for those that `filter(name, module)` chooses. A layer's
    `output` stays with it, for the next `to_sparse`. Returns `model`.

    Raises:
        TypeError: `model` is not a module, or `filter` is not callable.
        ValueError: `filter` chooses no layer that has a dense sibling.
    """
    _swap(_chosen("to_dense", model, filter), DENSE)
    return model


def _chosen(op: str, model: nn.Module, filter: Filter | None) -> dict[str, nn.Module]:
    """The modules to look at, each under the first name that the filter chooses."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module; got {type(model).__name__}")
    if filter is None:
        return dict(model.named_modules())
    if not callable(filter):
        raise TypeError(f"{op}: filter must be a function (name, module) -> bool; got {type(filter).__name__}")
    named = list(model.named_modules(remove_duplicate=False))
    found = {module: name for name, module in reversed(named) if filter(name, module)}
    layers = [name for name, module in named if type_before_parametrizations(module) in (*SPARSE, *DENSE)]
    if not any(type_before_parametrizations(module) in (*SPARSE, *DENSE) for module in found) and layers:
        raise ValueError(f"{op}: filter chooses none of the {len(layers)} layers, {layers[0]!r} to {layers[-1]!r}")
    return {name: module for module, name in reversed(found.items())}


def _refusal(module: nn.Module) -> str | None:
    """Why a module cannot be part of a sparse model."""
    place, name = type(module).__module__, type(module).__name__
    fused = place.startswith("torch.ao.nn.intrinsic.modules")  # in floating point
    if place.startswith(("torch.ao.nn.", "torch.ao.quantization.")) and name not in FLOAT_MODULES and not fused:
        return (
            "is a quantised layer, an observer or a fake quantisation, none of which has a sparse meaning. Convert and "
            "train the floating-point model, and quantise it after to_dense"
        )
    if isinstance(module, LazyModuleMixin) and module.cls_to_become in SPARSE and module.has_uninitialized_params():
        return "has no shape yet: run the model on a dense batch first"
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is TorchScript, which takes no SparseTensor. Convert the Python module; after to_dense it can be scripted "
            "again"
        )
    return None


def _swap(chosen: dict[str, nn.Module], table: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in chosen.values():
        kind = table.get(type_before_parametrizations(module))
        if kind is None:
            continue
        if is_parametrized(module):  # its class was made for it, with a property for each parameter
            own = {name: v for name, v in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
            kind = type(f"Parametrized{kind.__name__}", (kind,), own)
        module.__class__ = kind
