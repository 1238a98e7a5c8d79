"""How the process keeps the memory that it frees."""

from __future__ import annotations

from spark_fast.ops import native


def keep_memory() -> bool:
    """Freed memory stays with the process instead of going back to the system (glibc only).

    A training step on a CPU frees and allocates the same large tensors again and again. By default glibc gives such
    blocks back at once, and the system has to clear every page anew, which can take as long as the step itself. With
    this the process stays as large as it ever was. It acts on the whole process and cannot be undone; the environment
    variables `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1` do the same. `spark_fast.pretrain` calls it on a CPU.

    Returns:
        whether the C library did so.

    Raises:
        ImportError: the compiled module is missing.
    """
    return bool(native.module().keep_memory())
