"""Every op by every backend of a device, forward and backward, on tiny odd shapes: `python -m bench.gpu_small`.

Each case is compared with the float64 reference on the CPU and run twice, which must give the same bits. It is also
what compute-sanitizer watches; `--quick` leaves the comparison out, `--dtype` all other types.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import spark_fast as sf
from bench.gpu.measure import candidates, exact_float32, poisoned, prove
from bench.gpu.section import LOST
from spark_fast.nn import functional
from spark_fast.ops.conv import conv2d, conv_transpose2d, project
from spark_fast.ops.densify import gather_patches, scatter_patches
from spark_fast.ops.group_norm import group_norm
from spark_fast.ops.linear import linear
from spark_fast.ops.mlp import mlp
from spark_fast.ops.norm import batch_norm, batch_norm_scatter, layer_norm, layer_norm_scatter, layer_scale
from spark_fast.ops.patch_loss import patch_loss
from spark_fast.ops.pool import max_pool2d

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OWN = ("triton", "cuda", "cpu")  # whose results must be the same in every run
TERMS = 512  # products in the longest sum of any case, at most


@dataclass(frozen=True)
class Case:
    """`call(patches, *inputs)`; inputs are float64 on the CPU. `graded`: how many of them have gradients."""

    op: str
    name: str
    call: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    graded: int


def active() -> torch.Tensor:
    """Three images with no, some and all patches active."""
    some = torch.tensor([[True, False, True], [False, False, True]])
    return torch.stack((torch.zeros_like(some), some, torch.ones_like(some)))


def small_patches() -> sf.ActivePatches:
    return sf.ActivePatches(active())


def cases(patches: sf.ActivePatches) -> Iterator[Case]:
    yield from convolutions(patches)
    yield from others(patches)


def convolutions(patches: sf.ActivePatches) -> Iterator[Case]:
    def conv(op, side, channels, out, kernel, stride=1, padding=0, groups=1):
        def call(patches, x, w, b):
            return conv2d(x, w, b, patches, side, stride, padding, groups=groups)[0]

        weight = torch.randn(out, channels // groups, kernel, kernel).double() / kernel
        name = f"{kernel}x{kernel}/{stride}, side {side}, {channels} to {out}, {groups} groups"
        return Case(op, name, call, (rows(patches, side, channels), weight, torch.randn(out).double()), 3)

    yield conv("conv", 3, 5, 7, 3, padding=1)
    yield conv("conv", 1, 17, 33, 3, padding=1)
    yield conv("conv", 4, 5, 3, 3, 2, 1)
    yield conv("conv", 4, 3, 5, 7, 2, 3)
    yield conv("conv", 4, 3, 5, 4, 4)
    yield conv("conv", 2, 6, 4, 3, padding=1, groups=2)
    yield conv("depthwise", 3, 5, 5, 7, padding=3, groups=5)
    yield conv("depthwise", 1, 7, 7, 7, padding=3, groups=7)
    yield conv("depthwise", 4, 3, 3, 3, 2, 1, groups=3)
    yield conv("linear", 3, 5, 7, 1)
    yield from pixels(patches)
    x, token, weight = rows(patches, 3, 5), torch.randn(5).double(), torch.randn(3, 5, 3, 3).double()
    yield Case("conv", "projection of a filled map", lambda p, x, t, w: project(x, t, p, 3, w), (x, token, weight), 3)


def pixels(patches: sf.ActivePatches) -> Iterator[Case]:
    """To other sets of pixels and back."""

    def grown(patches, x, w):
        x = sf.SparseTensor(x, patches, 3)
        return functional.conv2d(x, w, None, 2, 1, groups=x.shape[1] // w.shape[1], output="dilated").features

    def there_and_back(patches, x, w, up):
        x = sf.SparseTensor(x, patches, 3)
        y = functional.conv2d(x, w, None, 2, 1, output="dilated")
        return functional.conv_transpose2d(y, up, None, 2, 1, output=x).features

    x, w, up = rows(patches, 3, 5), torch.randn(7, 5, 3, 3).double() / 3, torch.randn(7, 3, 3, 3).double() / 3
    depth = torch.randn(5, 1, 3, 3).double()
    yield Case("conv", "3x3/2, to a grown set of pixels", grown, (x, w), 2)
    yield Case("conv", "3x3/2, to a grown set of pixels and back", there_and_back, (x, w, up), 3)
    yield Case("conv", "3x3/2, transposed", lambda p, x, w: conv_transpose2d(x, w, None, p, 2, 2, 1, 1)[0],
               (rows(patches, 2, 7), up), 2)  # fmt: skip
    yield Case("depthwise", "3x3/2, to a grown set of pixels", grown, (x, depth), 2)


def others(patches: sf.ActivePatches) -> Iterator[Case]:
    def relu_norm(patches, x, w, b):
        return batch_norm(x, None, None, w, b, training=True, activation="relu")

    def joined_norm(patches, x, skip, w, b):
        return batch_norm(x, None, None, w, b, training=True, activation="silu", residual=skip)

    def filled_norm(patches, x, fill, w, b):
        return batch_norm_scatter(x, patches, 3, fill, None, None, w, b, training=True)

    (gh, gw), batch, count = patches.grid, patches.batch, patches.rows(4)
    x, weight, bias = rows(patches, 3, 5), torch.randn(5).double(), torch.randn(5).double()
    order = torch.randperm(count).double() - count // 2 + 0.5  # no equal values, exact in every dtype
    images, guess = (torch.randn(batch, 3, gh * 4, gw * 4).double() for _ in range(2))
    distinct = torch.stack((order, order.flip(0), -order), 1)
    matrix = torch.randn(7, 5).double()
    yield Case("linear", "linear", lambda p, x, w, b: linear(x, w, b), (x, matrix, torch.randn(7).double()), 3)
    yield Case("norm", "batch norm, ReLU", relu_norm, (x, weight, bias), 3)
    yield Case("norm", "batch norm, shortcut, SiLU", joined_norm, (x, rows(patches, 3, 5), weight, bias), 4)
    scaled = (x, weight, rows(patches, 3, 5))
    yield Case("norm", "layer scale, shortcut", lambda p, x, w, skip: layer_scale(x, w, skip), scaled, 3)
    widths = (x, torch.randn(20, 5).double(), torch.randn(20).double(), torch.randn(7, 20).double() / 4)
    yield Case("mlp", "MLP", lambda p, x, w1, b1, w2, b2: mlp(x, w1, b1, w2, b2), (*widths, torch.randn(7).double()), 5)
    yield Case("norm", "layer norm", lambda p, x, w, b: layer_norm(x, w, b), (x, weight, bias), 3)
    filled = (x, torch.randn(5).double(), weight, bias)
    yield Case("norm", "batch norm to maps", filled_norm, filled, 4)
    yield Case("norm", "layer norm to maps", lambda p, x, *rest: layer_norm_scatter(x, p, 3, *rest), filled, 4)
    six = (rows(patches, 3, 6), torch.randn(6).double(), torch.randn(6).double())
    for groups in (3, 6):
        name = f"group norm, {groups} groups"
        yield Case("group_norm", name, lambda p, x, w, b, groups=groups: group_norm(x, p, 3, groups, w, b), six, 3)
    yield Case("pool", "max pool 3x3/2", lambda p, x: max_pool2d(x, p, 4, 3, 2, 1)[0], (distinct,), 1)
    yield Case("densify", "gather", lambda p, images: gather_patches(images, p), (images,), 1)
    yield Case("densify", "scatter", lambda p, x, fill: scatter_patches(x, p, 3, fill), (x, bias), 2)
    yield Case("patch_loss", "patch loss", lambda p, guess, images: patch_loss(guess, images, p), (guess, images), 1)


def rows(patches: sf.ActivePatches, side: int, channels: int) -> torch.Tensor:
    return torch.randn(patches.rows(side), channels).double()


def results(case: Case, patches: sf.ActivePatches, dtype: torch.dtype, exact: bool = False) -> list[torch.Tensor]:
    """Output and gradients on the patches' device; `exact`: in float64, from inputs rounded to `dtype`."""
    wide = torch.float64 if exact else dtype
    inputs = [t.to(dtype).to(patches.device, wide).requires_grad_(i < case.graded) for i, t in enumerate(case.inputs)]
    out = case.call(patches, *inputs)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(torch.float16)  # exact in every dtype
    return [out.detach(), *torch.autograd.grad(out, inputs[: case.graded], weights.to(out))]


def run_case(case: Case, name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> str | None:
    """Why this backend does not take the case, or None. AssertionError if its results are wrong."""
    here, there = sf.ActivePatches(active().to(device)), small_patches()
    what = f"{case.op} {name} {case.name} {dtype}".replace("torch.", "")
    try:
        with sf.use_backend(name, case.op):
            with poisoned():
                ours = results(case, here, dtype)
            if quick:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return None
            again = results(case, here, dtype)
    except sf.BackendError as error:
        return str(error)
    if name in OWN:
        same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        assert same, f"{what}: two runs differ"
    pytorch = "library" if "library" in candidates(case.op, there.device, dtype) else "reference"
    with sf.use_backend(pytorch, case.op):
        theirs = results(case, there, dtype)
    with sf.use_backend("reference"):
        oracle = results(case, there, dtype, exact=True)
    prove(what, [t.cpu() for t in ours], theirs, oracle, [TERMS] * len(ours))
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
    parser.add_argument("--op", help="only this one")
    parser.add_argument("--backend", help="only this one")
    parser.add_argument("--quick", action="store_true", help="run each case once, compare nothing")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    device, lines = torch.device(chosen.device), []
    with exact_float32():
        for case in [c for c in cases(small_patches()) if chosen.op in (None, c.op)]:
            for dtype in [getattr(torch, chosen.dtype)] if chosen.dtype else DTYPES:
                for name in candidates(case.op, device, dtype):
                    if name != "reference" and chosen.backend in (None, name):
                        lines.append(verdict(case, name, device, dtype, chosen.quick))
                        print(lines[-1], flush=True)
    wrong = sum(line.startswith("WRONG") for line in lines)
    print(f"{wrong} wrong")
    return int(wrong > 0)


def verdict(case: Case, name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> str:
    """What is printed of a case: "ok", "left out" or "WRONG" first."""
    what = f"{case.op} {name} {case.name} {dtype}"
    try:
        reason = run_case(case, name, device, dtype, quick)
    except Exception as error:
        if LOST.search(str(error)):
            raise
        return f"WRONG {what}: {type(error).__name__}: {error}"
    return f"left out {what}: {reason}" if reason else f"ok {what}"


if __name__ == "__main__":
    sys.exit(main())
