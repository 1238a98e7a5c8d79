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
from spark_fast.ops.window import Geometry
from spark_fast.patches import ActivePatches

# op -> device type -> backends, preferred first. Each backend is the module spark_fast.ops.<op>.<backend>.
# "cpu half" is the CPU in float16 and bfloat16, for which PyTorch's library has instructions and our kernels have none.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "linear": {
        "cpu": ("cpu", "library", "reference"),
        "cpu half": ("library", "cpu", "reference"),
        "*": ("library", "reference"),
    },
    "mlp": {
        "cpu": ("cpu", "library", "reference"),
        "cpu half": ("library", "cpu", "reference"),
        "cuda": ("triton", "library", "reference"),
        "*": ("library", "reference"),
    },
    "conv": {
        "cpu": ("cpu", "library", "reference"),
        "cuda": ("cuda", "triton", "library", "reference"),
        "*": ("library", "reference"),
    },
    "depthwise": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference"), "*": ("reference",)},
    "pool": {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference"), "*": ("reference",)},
    "norm": {
        "cpu": ("cpu", "library", "reference"),
        "cuda": ("triton", "library", "reference"),
        "*": ("library", "reference"),
    },
    "group_norm": {
        "cpu": ("cpu", "library", "reference"),
        "cuda": ("triton", "library", "reference"),
        "*": ("library", "reference"),
    },
    "densify": {
        "cpu": ("library", "reference"),
        "cuda": ("triton", "cuda", "library", "reference"),
        "*": ("library", "reference"),
    },
    "patch_loss": {
        "cpu": ("cpu", "library", "reference"),
        "cuda": ("triton", "cuda", "library", "reference"),
        "*": ("library", "reference"),
    },
}
MEASURED = ("triton", "cuda")  # where both take a case, tables of measurements say which is faster
OPTIONAL = ("cuda",)  # backends that a machine may lack; the next one in the order runs there

_forced: ContextVar[dict[str, str] | None] = ContextVar("spark_fast_backend", default=None)
# The same for the process. It counts in threads that have forced nothing themselves: a checkpointed forward is computed
# again by the backward pass, which on a GPU runs in a thread of PyTorch's own. And in torch.compile, which can watch a
# dictionary but, before torch 2.14, no ContextVar.
_forced_anywhere: dict[str, str] = {}


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
    given = _forced.get()
    forced = (_forced_anywhere if given is None else given).get(op)
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
    if device.type != "cuda":
        return _load(op, order[0])
    fitting = _fitting(op, order, case)
    own = [name for name in fitting if name in MEASURED]
    if not case or len(own) < 2:
        return _load(op, fitting[0])
    return _load(op, _fastest(op, own, device, case))


def _fitting(op: str, order: tuple[str, ...], case: tuple) -> list[str]:
    """The backends that can run here and take the case, up to the first that no measurement can pass over."""
    fitting = []
    for name in order:
        try:
            module = _load(op, name)
        except BackendError:
            if name in OPTIONAL:
                continue
            raise
        if not _unsupported(module, case):
            fitting.append(name)
            if name not in MEASURED:
                break
    return fitting


def _fastest(op: str, names: list[str], device: torch.device, case: tuple) -> str:
    """The one that was fastest on such a case, by the tables of `spark_fast.ops.tuning`; else the first that does not
    itself expect another to be faster (`yields` of its module)."""
    from spark_fast.ops import tuning

    first = case[0]
    key = tuple(_described(value, first) for value in case)
    configs = [{"backend": name} for name in names]

    def trial(config: dict) -> None:
        api = importlib.import_module(f"spark_fast.ops.{op}.api")
        api.trial(_load(op, config["backend"]), *case)

    best = tuning.best(f"{op}.backend", key, first.shape[0], configs, trial, device)
    if best:
        return best["backend"]
    return next((n for n in names if not getattr(_load(op, n), "yields", lambda *_: False)(*case)), names[0])


def _described(value: object, first: torch.Tensor) -> object:
    """What of an argument a measurement holds for: not the number of rows or images."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, *value.shape[1 if value.shape == first.shape else 0 :])
    if isinstance(value, Geometry):
        window = value.window
        return (*window.kernel, *window.stride, *window.padding, *window.dilation, *value.patch_in, *value.patch_out)
    return value.grid if isinstance(value, ActivePatches) else value


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
        known = sorted({n for o in ([op] if op else ORDER) for names in ORDER[o].values() for n in names})
        where = f" of op {op!r}" if op else ""
        raise ValueError(f"no backend {name!r}{where}; it must be one of {', '.join(known)}")
    token = _forced.set({**(_forced.get() or {}), **dict.fromkeys(chosen, name)})
    _forced_anywhere.update(_forced.get())
    try:
        yield
    finally:
        _forced.reset(token)
        _forced_anywhere.clear()
        _forced_anywhere.update(_forced.get() or {})


@contextlib.contextmanager
def forced_here(op: str, name: str) -> Iterator[None]:
    """Forces the backend that `forced_in_graphs` told when the graph was made; backward passes run in other threads,
    which do not see what `use_backend` set."""
    token = _forced.set({**(_forced.get() or {}), op: name} if name else _forced.get())
    try:
        yield
    finally:
        _forced.reset(token)


def forced_in_graphs(op: str) -> str:
    """The backend that `use_backend` forces for `op`, "" for none, as code that torch.compile traces may ask for it:
    the answer becomes part of the graph, which is made anew when it changes."""
    return _forced_anywhere.get(op, "")


def report() -> list[dict[str, object]]:
    """Per op, device and backend: is it available, is it the one that runs, and why not."""
    rows = []
    for op, devices in ORDER.items():
        for device in ("cpu", "cpu half", "cuda"):
            if device == "cpu half" and device not in devices:
                continue
            names = devices.get(device, devices["*"])
            problems = {name: _problem(op, name, device) for name in names}
            runs = next((name for name in names if not problems[name] or name not in OPTIONAL), None)
            for name in names:
                chosen = name == runs and not problems[name]
                waits = f"'{runs}' comes first; force it with use_backend('{name}')"
                if name in MEASURED and runs in MEASURED:
                    waits += ", or let autotune() measure which is faster on a shape"
                rows.append(
                    {"op": op, "device": device, "backend": name, "available": not problems[name], "chosen": chosen,
                     "reason": "" if chosen else problems[name] or waits}
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
