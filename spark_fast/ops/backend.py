"""Which backend of an op runs: by device, in a documented order, or as forced by `use_backend`.

The first backend that is listed for the device and takes the case runs. Nothing falls back silently: when its compiler
or native module is missing the call raises. The one exception is "cuda", an addition for machines with nvcc.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

from spark_fast.ops.triton_launch import interpreted

# op -> device type -> backends, preferred first. Each backend is the module spark_fast.ops.<op>.<backend>.
# "cpu half" is the CPU in float16 and bfloat16, for which PyTorch's library has instructions and our kernels have none.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "linear": {
        "cpu": ("cpu", "library", "reference"),
        "cpu half": ("library", "cpu", "reference"),
        "*": ("library", "reference"),
    },
    "conv": {
        "cpu": ("cpu", "library", "reference"),
        "cuda": ("triton", "library", "reference"),
        "*": ("library", "reference"),
    },
    "depthwise": {"cpu": ("cpu", "reference"), "*": ("reference",)},
    "pool": {"cpu": ("cpu", "reference"), "*": ("reference",)},
    "norm": {"cpu": ("cpu", "library", "reference"), "*": ("library", "reference")},
    "densify": {
        "cpu": ("library", "reference"),
        "cuda": ("library", "cuda", "reference"),
        "*": ("library", "reference"),
    },
    "patch_loss": {"cpu": ("cpu", "library", "reference"), "*": ("library", "reference")},
}
OPTIONAL = ("cuda",)  # backends that a machine may lack; the next one in the order runs there

_forced: ContextVar[dict[str, str] | None] = ContextVar("spark_fast_backend", default=None)


class BackendError(RuntimeError):
    """A backend cannot run here; the message says why and what to do."""


def _order(op: str, device: str, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    half = f"{device} half" if dtype in (torch.float16, torch.bfloat16) else device
    return ORDER[op].get(half) or ORDER[op].get(device, ORDER[op]["*"])


def _load(op: str, backend: str) -> ModuleType:
    module = importlib.import_module(f"spark_fast.ops.{op}.{backend}")
    problem = getattr(module, "unavailable", lambda: None)()
    if problem:
        raise BackendError(f"backend '{backend}' of op '{op}' cannot run here: {problem}")
    return module


def select(op: str, device: torch.device, dtype: torch.dtype | None = None, *case: object) -> ModuleType:
    """The backend module that runs `op` on `device`, in `dtype` where that matters.

    Args:
        case: the op's arguments, which a backend that does not take all of them looks at (`unsupported` of its module).

    Raises:
        BackendError: the preferred backend, or the forced one, cannot run here; or the forced one does not take the
            case.
    """
    order = _order(op, device.type, dtype)
    forced = (_forced.get() or {}).get(op)
    if forced is not None:
        if forced not in order and not (forced == "triton" and device.type == "cpu" and interpreted()):
            raise BackendError(
                f"backend '{forced}' of op '{op}' does not run on {device.type}; it has {', '.join(order)}"
            )
        module = _load(op, forced)
        reason = _unsupported(module, case)
        if reason:
            raise BackendError(f"backend '{forced}' of op '{op}' does not take this case: {reason}")
        return module
    for name in order[:-1]:
        try:
            module = _load(op, name)
        except BackendError:
            if name in OPTIONAL:
                continue
            raise
        if not _unsupported(module, case):
            return module
    return _load(op, order[-1])


def _unsupported(module: ModuleType, case: tuple) -> str | None:
    return module.unsupported(*case) if case and hasattr(module, "unsupported") else None


@contextlib.contextmanager
def use_backend(name: str, op: str | None = None) -> Iterator[None]:
    """Forces one backend, for tests and benchmarks: `with use_backend("reference"): ...`.

    Args:
        name: the backend.
        op: the op to force it for; by default every op that has a backend of this name.

    Raises:
        ValueError: no such op or backend.
    """
    if op is not None and op not in ORDER:
        raise ValueError(f"op must be one of {', '.join(ORDER)}; got {op!r}")
    having = [o for o in ORDER if any(name in names for names in ORDER[o].values())]
    chosen = [o for o in having if op in (None, o)]
    if not chosen:
        raise ValueError(f"no backend {name!r}" + (f" of op {op!r}" if op else "") + f"; see {__name__}.ORDER")
    token = _forced.set({**(_forced.get() or {}), **dict.fromkeys(chosen, name)})
    try:
        yield
    finally:
        _forced.reset(token)


def report() -> list[dict[str, object]]:
    """Per op, device and backend: is it available, is it the one that runs, and why not."""
    rows = []
    for op, devices in ORDER.items():
        for device in ("cpu", "cpu half", "cuda"):
            if device == "cpu half" and device not in devices:
                continue
            names = devices.get(device, devices["*"])
            for name in names:
                reason = _problem(op, name, device)
                chosen = name == names[0] and not reason
                if not reason and not chosen:
                    reason = f"'{names[0]}' comes first; force it with use_backend('{name}')"
                available = chosen or reason.startswith("'")
                rows.append(
                    {"op": op, "device": device, "backend": name, "available": available, "chosen": chosen,
                     "reason": "" if chosen else reason}
                )  # fmt: skip
    return rows


def _problem(op: str, name: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        _load(op, name)
    except BackendError as error:
        return str(error.args[0]).split(": ", 1)[1]
    return ""
