"""The table of rules, and what happens to a function that has none."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FunctionType

import torch
import torch.nn.functional as F

from spark_fast.rules.custom import function_around, keys_of

RULES: dict[Callable, Callable] = {}
_warned: set[str] = set()
_USUAL = {"axis": "dim", "keepdims": "keepdim"}


class SparseOpError(NotImplementedError):
    """An operation has no sparse rule and no exact dense form on a masked map."""


def rule(*functions: Callable) -> Callable:
    """Registers the decorated function as the sparse rule of `functions`; it receives their arguments.

    At least one of these arguments is a `SparseTensor`. It should return one (`x.with_features(rows)`), or a dense
    tensor where space is reduced. A later rule takes the place of an earlier one.

    Args:
        functions: what modules call: functions of PyTorch (torch.cumsum and torch.Tensor.cumsum are two), custom ops of
            torch.library, subclasses of torch.autograd.Function, and functions of your own that dispatch, as
            torch.overrides.wrap_torch_function makes them.

    Raises:
        TypeError: one of `functions` is none of these, so that its rule would never be asked for.
    """
    keys = [key for function in functions for key in keys_of(function)]

    def register(handler: Callable) -> Callable:
        RULES.update(dict.fromkeys(keys, handler))
        return handler

    return register


def named(names: str, *spaces: object) -> list[Callable]:
    """The functions of these names in torch, torch.Tensor and torch.nn.functional."""
    spaces = spaces or (torch, torch.Tensor, F)
    return [f for name in names.split() for space in spaces if callable(f := getattr(space, name, None))]


def usual_names(func: Callable, kwargs: dict) -> dict:
    """`kwargs` with PyTorch's names for NumPy's, which functions of PyTorch that are no Python take as well."""
    if not kwargs or isinstance(func, FunctionType):
        return kwargs
    return {_USUAL.get(name, name): value for name, value in kwargs.items()}


def name_of(func: Callable) -> str:
    if torch.compiler.is_compiling():
        return func.__name__
    if "<locals>" in getattr(func, "__qualname__", ""):  # F.adaptive_max_pool2d and its like are closures
        return next((name for name, value in vars(F).items() if value is func), func.__name__)
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
    return name.replace("_VariableFunctionsClass.", "torch.").replace("TensorBase.", "Tensor.")


def where() -> str:
    """The innermost module whose forward is running, from the call stack."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return f" (called in {type(owner).__name__})"
        frame = frame.f_back
    return ""


def no_out(op: str, out: torch.Tensor | None) -> None:
    if out is not None:
        raise SparseOpError(
            f"{op}{where()} would write a sparse result into a dense tensor; write x.to_dense() into it"
        )


def check_differentiable() -> None:
    """Raises if a custom torch.autograd.Function runs on a sparse map: it takes one for a constant."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a Function's forward runs without gradients
        return
    name = function_around()
    if name is None:
        return
    if name == "CheckpointFunction":
        way_out = "Call torch.utils.checkpoint with use_reentrant=False"
    else:
        way_out = f"Register a rule with @spark_fast.rule({name}) that calls {name}.apply on tensors"
    raise SparseOpError(
        f"{name}{where()} is a torch.autograd.Function, which takes a sparse map for a constant: its backward would "
        f"never run. {way_out}"
    )


def refusal(func: Callable) -> SparseOpError:
    return SparseOpError(
        f"{name_of(func)}{where()} has no sparse rule. On a masked map it may not mean what the dense operation does. "
        "Register one with @spark_fast.rule(function), or convert with x.to_dense() where that is what you mean"
    )


def warn_dense(op: str) -> None:
    """One warning for each operation that runs on the dense map."""
    if op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"{op}{where()} has no sparse rule: it runs on the dense, zero-filled map and is masked again "
            "(exact, but no pixel is skipped)",
            stacklevel=5,
        )
