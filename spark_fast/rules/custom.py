"""Functions that are not PyTorch's own: which of them ask for a rule, and torch.autograd.Function, which asks for none.

PyTorch calls a Function's forward with a sparse map as it is, takes the map for a constant and records nothing: the
backward would never run. So a Function on a sparse map is refused, unless it has a rule.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType

import torch
from torch import nn
from torch.autograd import Function

from spark_fast.tensor import SparseMap

_owners: dict[int, tuple[CodeType, str]] = {}  # by id, with the code, so that the id stays its own


def keys_of(function: Callable) -> list[Callable]:
    """What `function` is looked up as among the rules.

    Raises:
        TypeError: a rule for it would never be looked up.
    """
    if isinstance(function, torch.library.CustomOpDef):
        function = function._opoverload
    if isinstance(function, torch._ops.OpOverload):
        packet = function.overloadpacket
        return [function, packet] if packet.overloads() == [function._overloadname] else [function]
    if isinstance(function, torch._ops.OpOverloadPacket):
        return [function, *(getattr(function, name) for name in function.overloads())]
    if isinstance(function, type) and issubclass(function, Function) and function is not Function:
        if "_asks_for_rule" not in vars(function):
            _let_ask(function)
        return [function]
    name = getattr(function, "__qualname__", repr(function))
    if isinstance(function, nn.Module) or (isinstance(function, type) and issubclass(function, nn.Module)):
        raise TypeError(f"rule: {name} is a module; give the function that its forward calls, such as F.unfold")
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"rule: {function!r} is not a function")
    foreign = inspect.isfunction(function) and (function.__module__ or "").split(".")[0] != "torch"
    if foreign and not _dispatches(function):
        raise TypeError(
            f"rule: {name} is a Python function, which runs as it is: the functions that it calls ask for rules. "
            "Decorate it with torch.overrides.wrap_torch_function to make it ask for its own"
        )
    return [function]


def _dispatches(function: Callable) -> bool:
    return any("torch_function" in name for name in function.__code__.co_names)


def _let_ask(function: type[Function]) -> None:
    """Makes `function.apply` ask for its rule where an argument is a sparse map."""
    own = vars(function).get("apply")

    def apply(cls, *args, **kwargs):
        sparse = next((a for a in (*args, *kwargs.values()) if isinstance(a, SparseMap)), None)
        if sparse is not None:
            return sparse.__torch_function__(cls, (), args, kwargs)
        plain = super(function, cls).apply if own is None else own.__get__(None, cls)
        return plain(*args, **kwargs)

    function.apply = classmethod(apply)
    function._asks_for_rule = True


def function_around() -> str | None:
    """The torch.autograd.Function whose forward is running with a sparse map, from the call stack."""
    frame = sys._getframe(1)
    while frame is not None:
        name = _owner(frame.f_code)
        if name and any(map(_has_sparse, frame.f_locals.values())):
            return name
        frame = frame.f_back
    return None


def _has_sparse(value) -> bool:
    """Also what a sparse map becomes within a module: padded, or a sequence of pixels."""
    if isinstance(value, list | tuple):
        return any(map(_has_sparse, value))
    return hasattr(type(value), "__torch_function__") and not isinstance(value, torch.Tensor)


def _owner(code: CodeType) -> str:
    """The name of the Function whose forward has this code, or ""."""
    if id(code) not in _owners:
        found = (f.__name__ for f in _subclasses(Function) if any(code is c for c in _forwards(f)))
        _owners[id(code)] = code, next(found, "")
    return _owners[id(code)][1]


def _subclasses(cls: type) -> Iterator[type]:
    for subclass in type.__subclasses__(cls):
        yield subclass
        yield from _subclasses(subclass)


def _forwards(function: type[Function]) -> Iterator[CodeType]:
    """The code of its forward, and of what that wraps."""
    forward = getattr(vars(function).get("forward"), "__func__", None)
    while forward is not None:
        if hasattr(forward, "__code__"):
            yield forward.__code__
        forward = getattr(forward, "__wrapped__", None)
