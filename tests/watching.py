"""What operations run, what they allocate, and which of them would make a GPU wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCS = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "is_nonzero", "equal", "bincount")
HOST_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Watch(TorchDispatchMode):
    """Notes every output of every operation, and every operation whose result shape or value the host must wait for."""

    def __init__(self):
        super().__init__()
        self.outputs: list[tuple[str, tuple[int, ...]]] = []
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name.strip("_") in [s.strip("_") for s in SYNCS]:
            self.syncs.append(name)
        indices = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_", "_unsafe_index") else []
        if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices):
            self.syncs.append(f"{name} with a bool mask")
        if name == "repeat_interleave" and isinstance(tree_leaves(args)[-1], Tensor):
            self.syncs.append(f"{name} with a tensor of repeats")
        result = func(*args, **(kwargs or {}))
        # a view allocates nothing, and so does a result that is one of the arguments
        given = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for out in tree_leaves(result):
            if isinstance(out, Tensor) and out.numel() and out.untyped_storage().data_ptr() not in given:
                self.outputs.append((name, tuple(out.shape)))
        return result


@contextmanager
def host_reads(notes: list[str]) -> Iterator[None]:
    """Notes the Tensor methods that hand values to Python (some of them dispatch nothing on a CPU tensor), and tensors
    made of numpy's memory, which no mode sees."""
    places = [(Tensor, name) for name in HOST_METHODS] + [(torch, "from_numpy"), (torch, "frombuffer")]
    original = [getattr(*place) for place in places]

    def noting(name: str, real: Callable) -> Callable:
        def method(*args, **kwargs):
            notes.append(name)
            return real(*args, **kwargs)

        return method

    try:
        for (owner, name), real in zip(places, original, strict=True):
            setattr(owner, name, noting(name, real))
        yield
    finally:
        for (owner, name), real in zip(places, original, strict=True):
            setattr(owner, name, real)


FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class HostMade(TorchFunctionMode):
    """Notes tensors made of Python's or numpy's numbers: to a GPU each of them is a copy that waits."""

    def __init__(self):
        super().__init__()
        self.notes: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FROM_HOST:
            self.notes.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[Watch]:
    """Fails where the block does something that would make a GPU wait, as far as a CPU shows it."""
    read: list[str] = []
    with Watch() as watch, HostMade() as made, host_reads(read):
        yield watch
    assert watch.outputs
    assert (watch.syncs, made.notes, read) == ([], [], [])
