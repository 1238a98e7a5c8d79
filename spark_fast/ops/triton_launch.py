"""Launching Triton kernels: on a GPU, on the CPU in Triton's interpreter, or only recorded, to be compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
LARGEST = 2**31 - 2**16  # rows: the last tile may reach beyond them


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not load ({error}); `pip install triton` (Linux), or use another backend"
    return None


def interpreted() -> bool:
    """Do kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when they were imported)?"""
    if unavailable():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what `triton.compile` needs, and what tells it from others."""

    kernel: Any
    signature: dict[str, str]  # argument -> Triton type; "constexpr" for constants
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> tuple:
        parts = (self.signature, self.constants, self.options)
        return (self.name, *(tuple(sorted(p.items(), key=str)) for p in parts), self.divisible)


_recorder: ContextVar[list[Launch] | None] = ContextVar("spark_fast_launches", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are listed instead of run; the tensors may be on any device, "meta" too."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    """Are launches listed instead of run, so that results have no values?"""
    return _recorder.get() is not None


def packed(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as kernels read them: contiguous, without a pending negation."""
    return tuple(None if t is None else t.contiguous().resolve_neg() for t in tensors)


def launch(kernel, grid: tuple[int, ...], *args: torch.Tensor | int | float | None, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)` on the tensors' device and its current stream; nothing for an empty grid.

    Args:
        args: the kernel's arguments that are no constants, in order.
        constants: its tl.constexpr arguments, and num_warps and num_stages.

    Raises:
        ValueError: a number is too large for the kernels' 32-bit arguments.
        TypeError: a tensor subclass, such as a FakeTensor, which has no memory that a kernel could read.
    """
    if 0 in grid:
        return
    for value in args:
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"{kernel.__name__}: at most {LARGEST} rows; got {value}. Use a smaller batch")
        if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"{kernel.__name__} needs plain tensors; got {type(value).__name__}")
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(_describe(kernel, args, constants))
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **constants)


def _describe(kernel, args: tuple, constants: dict[str, Any]) -> Launch:
    options = {name: constants[name] for name in OPTIONS if name in constants}
    constants = {name: value for name, value in constants.items() if name not in OPTIONS}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    signature, divisible = {}, []
    for name, value in zip([n for n in kernel.arg_names if n not in constants], args, strict=True):
        if value is None:
            constants[name] = None
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            divisible.append(name)  # what PyTorch allocates
        elif isinstance(value, int) and value == 1 and name not in fixed:
            constants[name] = 1  # as Triton's own launches do
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and name not in fixed:
                divisible.append(name)
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return Launch(kernel, signature, constants, tuple(divisible), options)


def dot_constants(matmul: bool = False) -> dict[str, Any]:
    """The constants PRECISION and UPCAST of kernels with matrix products.

    PRECISION is "tf32" or "ieee", as PyTorch's flags for convolutions, or for `matmul`, say; where one says "none" the
    next above counts. UPCAST: operands must be float32 before tl.dot, since the interpreter multiplies the bits of
    bfloat16.
    """
    own = (torch.backends.cuda.matmul,) if matmul else (torch.backends.cudnn.conv, torch.backends.cudnn)
    flags = [getattr(level, "fp32_precision", "none") for level in (*own, torch.backends)]
    chosen = next((flag for flag in flags if flag != "none"), "ieee")
    return {"PRECISION": "tf32" if chosen == "tf32" else "ieee", "UPCAST": interpreted()}
