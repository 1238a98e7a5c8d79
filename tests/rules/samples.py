"""Runs PyTorch's own sample inputs on sparse tensors without masked pixels and on dense ones; prints JSON.

A process of its own for `test_samples.py`: what it imports from PyTorch sets hypothesis's profile and forbids to set
torch.backends. For each operation it prints how many calls were compared, what was refused and what was different.

A sample's first argument is taken as a map of each of the dimensions in `LAYOUTS`; one of fewer than four dimensions
also gets height and width of its own. Calls that the dense tensor refuses do not count.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_map

import spark_fast as sf
from spark_fast.ops.densify import gather_patches
from spark_fast.rules.padded import PaddedMap
from spark_fast.rules.tokens import Tokens
from spark_fast.rules.views import make, order
from spark_fast.tensor import SparseMap

LAYOUTS = {3: ("BHW", "HBW"), 4: ("BCHW", "BHWC", "CBHW"), 5: ("BCCHW", "BCHWC", "BHWCC")}
OWN_SPACE = (2, 4)  # height and width of what has none
MOST, MOST_MAPS = 8, 16  # samples of each kind, and of those with four dimensions or more
TOLERANCES = {  # torch.testing's
    torch.float64: {"rtol": 1e-7, "atol": 1e-7},
    torch.float32: {"rtol": 1.3e-6, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-5},
}
LARGEST = 2000  # elements of a sample
RANDOM = re.compile(r"bernoulli|empty_like|rand_like|randn_like|nn\.functional\.(.*dropout.*|rrelu)|normal.*|new_empty")


OTHERS = re.compile(r"fft\.|jiterator|linalg\.(?!norm|vector_norm)|masked\.|sparse\.|signal\.")  # matrices, signals


class DifferentError(Exception):
    """A sparse result is not the dense one."""


class Kind:
    """What `views.make` asks of a map."""

    fusion = None

    def __init__(self, patches: sf.ActivePatches, side: int):
        self.patches, self.side = patches, side


def wrapped(t: torch.Tensor, dims: str, kind: Kind) -> SparseMap:
    """`t`, whose dimensions are `dims`, as a map without masked pixels."""
    t = t.permute(order(dims, "B" + "C" * dims.count("C") + "HW"))
    channels = t.shape[1:-2]
    rows = gather_patches(t.reshape(t.shape[0], channels.numel(), *t.shape[-2:]), kind.patches)
    return make(rows.reshape(kind.patches.rows(kind.side), *channels), kind, dims)


def plain(out) -> object:
    """`out` as a dense tensor, pixels in their order in the image."""
    if isinstance(out, SparseMap | PaddedMap):
        return out.to_dense()
    if isinstance(out, Tokens):
        values, length = out.values, out.patches.per_image * out.side**2
        places = out.patches.pixels(out.side)[1][:length]  # of the first image's packed rows
        for dim, name in enumerate(out.dims):
            values = values.index_select(dim, places.argsort()) if name == "S" else values
        return values
    return out


def flat(out) -> list:
    return [leaf for part in out for leaf in flat(part)] if isinstance(out, tuple | list) else [plain(out)]


def with_space(sample, last: bool) -> tuple | None:
    """The sample's arguments, the first with height and width as its last dimensions, or after the batch."""
    first = sample.input
    if not isinstance(first, torch.Tensor) or not 1 <= first.dim() <= 3 or not first.is_floating_point():
        return None

    def spread(t):
        if not isinstance(t, torch.Tensor) or t.shape != first.shape or not t.is_floating_point():
            return t
        scale = torch.linspace(0.5, 1, math.prod(OWN_SPACE), dtype=t.dtype)
        t = t if t.dim() > 1 else t[:, None]
        if last:
            return t[..., None, None] * scale.view(OWN_SPACE)
        return t[:, None, None] * scale.view(*OWN_SPACE, *[1] * (t.dim() - 1))

    return tree_map(spread, (first, sample.args, sample.kwargs))


def samples_of(op) -> Iterator[tuple]:
    """(first argument, others, keyword arguments), as they are and with a space of their own."""
    chance = random.Random(0)
    torch.manual_seed(0)
    found = list(op.sample_inputs("cpu", torch.float64))
    if "nn.functional" not in op.name:
        found += list(op.reference_inputs("cpu", torch.float64))
    found = [s for s in found if not isinstance(s.input, torch.Tensor) or s.input.numel() <= LARGEST]
    lists = [(s.input, s.args, s.kwargs) for s in found]
    maps = [s for s in lists if dims_of(s[0]) and dims_of(s[0])[0] != "BHW"]
    others = [s for s in lists if dims_of(s[0]) and dims_of(s[0])[0] == "BHW"]
    lifted = ([s for sample in found if (s := with_space(sample, last)) is not None] for last in (True, False))
    for group, most in ((maps, MOST_MAPS), *((group, MOST) for group in (others, *lifted))):
        yield from chance.sample(group, most) if len(group) > most else group


def dims_of(first) -> tuple[str, ...]:
    """The layouts in which it can be a map, or maps."""
    tensors = first if isinstance(first, list | tuple) else [first]
    if not tensors or not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors):
        return ()
    return LAYOUTS.get(tensors[0].dim(), ()) if len({t.dim() for t in tensors}) == 1 else ()


def on_one_map(first, dims: str) -> bool:
    """Have the tensors of a list the same batch, height and width?"""
    tensors = first if isinstance(first, list | tuple) else [first]
    return len({tuple(t.shape[dims.index(name)] for name in "BHW") for t in tensors}) == 1


def kinds(shape: torch.Size, dims: str) -> Iterator[Kind]:
    """The largest square patches that fit, and single pixels."""
    batch, height, width = (shape[dims.index(name)] for name in "BHW")
    for side in {math.gcd(height, width), 1} if height and width else ():
        active = torch.ones(batch, height // side, width // side, dtype=torch.bool)
        yield Kind(sf.ActivePatches(active), side)


def calls_of(op) -> Iterator[tuple[Callable, bool]]:
    """The function, its method and its method in place (True)."""

    def method(name: str) -> Callable:
        return lambda first, *args, **kwargs: getattr(first, name)(*args, **kwargs)

    names = [getattr(f, "__name__", "") for f in (op.op, op.method_variant, op.inplace_variant)]
    if op.op is not op.method_variant:
        yield op.op, False
    if hasattr(torch.Tensor, names[1]):
        yield method(names[1]), False
    if names[2].endswith("_") and not names[2].endswith("__") and hasattr(torch.Tensor, names[2]):
        yield method(names[2]), True


def run(
    call: Callable, in_place: bool, sample: tuple, learn: bool, wrap: Callable | None = None, both: bool = False
) -> tuple:
    """Results of one call, and gradients of all its tensors (`learn`) or only of the first argument.

    `wrap` makes the first argument sparse, and with `both` those of its shape too.
    """
    leaves = []

    def leaf(t):
        if not isinstance(t, torch.Tensor):
            return t
        t = t.detach().clone()
        if t.is_floating_point():
            leaves.append(t.requires_grad_())
        return t

    first, args, kwargs = tree_map(leaf, sample) if learn else (tree_map(leaf, sample[0]), *copied(sample[1:]))
    if wrap is not None:
        shape = getattr(first, "shape", None)
        if both:
            args = tuple(wrap(a) if isinstance(a, torch.Tensor) and like(a, shape) else a for a in args)
        first = [wrap(t) for t in first] if isinstance(first, list | tuple) else wrap(first)
    elif in_place:
        first = first.clone()
    torch.manual_seed(0)
    out = flat(call(first, *args, **kwargs)) + (flat(first) if in_place else [])
    known = [t for t in out if isinstance(t, torch.Tensor) and t.requires_grad and t.is_floating_point()]
    if not known:
        return out, []
    total = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in known)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return out, [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def copied(values):
    return tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, values)


def like(t: torch.Tensor, shape) -> bool:
    return t.shape == shape and t.is_floating_point()


def compare(mine: list, theirs: list, values: bool) -> None:
    if len(mine) != len(theirs):
        raise DifferentError(f"{len(mine)} results for {len(theirs)}")
    for a, b in zip(mine, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            if a != b:
                raise DifferentError(f"{a} for {b}")
        elif not isinstance(a, torch.Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            raise DifferentError(f"{type(a).__name__} {getattr(a, 'shape', '')} for {tuple(b.shape)} {b.dtype}")
        elif values and not torch.allclose(a, b, **TOLERANCES.get(b.dtype, {}), equal_nan=True):
            raise DifferentError(f"values {a.flatten()[:4].tolist()} for {b.flatten()[:4].tolist()}")


def dense_run(call: Callable, in_place: bool, sample: tuple) -> tuple[bool, tuple | None]:
    """Whether all tensors can have gradients (running statistics cannot), and the results; None for no such call."""
    for learn in (True, False):
        try:
            return learn, run(call, in_place, sample, learn)
        except Exception:
            continue
    return False, None


def defined(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """A gradient, where the dense one is finite."""
    return torch.where(theirs.isfinite(), mine, theirs) if mine.shape == theirs.shape else mine


def check(op, name: str) -> dict:
    compared, refused, different = 0, Counter(), []
    values = RANDOM.fullmatch(name) is None  # else other numbers each time: shapes and dtypes are compared
    for sample in samples_of(op):
        if not compared and refused.total() == sum(n for why, n in refused.items() if "has no sparse rule" in why) > 20:
            break
        shape = (sample[0][0] if isinstance(sample[0], list | tuple) else sample[0]).shape
        wraps = [(d, k) for d in dims_of(sample[0]) if on_one_map(sample[0], d) for k in kinds(shape, d)]
        several = any(isinstance(a, torch.Tensor) and like(a, shape) for a in sample[1])
        for call, in_place in calls_of(op):
            learn, dense = dense_run(call, in_place, sample)
            for dims, kind, both in ((d, k, b) for d, k in wraps for b in {False, several} if dense is not None):
                try:
                    wrap = partial(wrapped, dims=dims, kind=kind)
                    out, grads = run(call, in_place, sample, learn, wrap, both)
                    compare(out, dense[0], values)
                    if values:
                        compare([defined(a, b) for a, b in zip(grads, dense[1], strict=False)], dense[1], True)
                    compared += 1
                except (sf.SparseOpError, ValueError, IndexError, AttributeError) as error:
                    refused[f"{type(error).__name__}: {error}"] += 1
                except Exception as error:
                    where = f"{dims} {tuple(shape)}, patches of {kind.side}, {sample[1:]}"
                    different.append(f"{where[:300]}: {type(error).__name__}: {str(error)[:300]}")
    return {"compared": compared, "refused": refused, "different": different[:5]}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report = {}
    for op in op_db:
        name = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")
        wanted = name in sys.argv[1:] if len(sys.argv) > 1 else not OTHERS.match(name)
        if wanted and op.supports_dtype(torch.float64, "cpu"):
            report[name] = check(op, name)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
