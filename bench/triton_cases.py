"""The launches of the Triton kernels on layers of ResNet-50 and ConvNeXt-B (256 images, 224 px, 20 of 49 patches)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import spark_fast as sf
from spark_fast.ops.tuning import Config
from spark_fast.ops.window import Geometry, Window

HALF, FLOAT = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call that launches kernels on "meta" tensors; `configs`: run it with each of them instead of its own choice."""

    name: str
    run: Callable[[], object]
    configs: tuple[Config, ...] = ()


def patches() -> sf.ActivePatches:
    generator = torch.Generator().manual_seed(0)
    return sf.ActivePatches(sf.random_patch_mask(256, (7, 7), 0.6, generator), per_image=20)


def cases() -> Iterator[Case]:
    yield from convolution(patches())


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def without_tf32(run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return run()

    return inside


def convolution(active: sf.ActivePatches) -> Iterator[Case]:
    from spark_fast.ops.conv import configs, triton

    def directions(name, side, channels, out, window, dtype, every_config, groups=1):
        geometry = Geometry.of(active, side, window)
        x = meta(geometry.rows_in, channels, dtype=dtype)
        grad = meta(geometry.rows_out, out, dtype=dtype)
        w, b = meta(out, channels // groups, *window.kernel, dtype=dtype), meta(out, dtype=dtype)
        unfold = channels // groups <= triton.MOST_UNFOLDED
        gather = tuple(configs.gather_configs(dtype, "tf32", unfold)) if every_config else ()
        outer = tuple(configs.outer_configs(dtype, "tf32", unfold)) if every_config else ()
        name = f"{name}, {channels} -> {out}, side {side}, {str(dtype).removeprefix('torch.')}"
        yield Case(f"conv forward {name}", lambda: triton.forward(x, w, b, geometry, groups), gather)
        if channels > 3:
            yield Case(f"conv grad-input {name}", lambda: triton.grad_input(grad, w, geometry, groups), gather)
        yield Case(f"conv grad-weight {name}", lambda: triton.grad_weight(grad, x, geometry, groups, w), outer)

    three, down = Window((3, 3), (1, 1), (1, 1)), Window((3, 3), (2, 2), (1, 1))
    yield from directions("3x3", 8, 64, 64, three, HALF, True)
    yield from directions("3x3", 4, 128, 128, three, HALF, False)
    yield from directions("3x3", 2, 256, 256, three, HALF, False)
    yield from directions("3x3", 1, 512, 512, three, HALF, True)
    for dtype in (torch.float16, FLOAT):
        yield from directions("3x3", 8, 64, 64, three, dtype, dtype == FLOAT)
        yield from directions("3x3", 1, 512, 512, three, dtype, False)
    for case in directions("3x3 without TF32", 8, 64, 64, three, FLOAT, False):
        yield Case(case.name, without_tf32(case.run))
    yield from directions("3x3/2", 8, 128, 128, down, HALF, True)
    yield from directions("1x1/2", 8, 256, 512, Window((1, 1), (2, 2)), HALF, False)
    yield from directions("7x7/2", 32, 3, 64, Window((7, 7), (2, 2), (3, 3)), HALF, True)
    yield from directions("7x7/2", 32, 3, 64, Window((7, 7), (2, 2), (3, 3)), FLOAT, False)
    yield from directions("4x4/4", 32, 3, 128, Window((4, 4), (4, 4)), HALF, False)
    yield from directions("2x2/2", 8, 128, 256, Window((2, 2), (2, 2)), HALF, False)
    yield from directions("3x3 in 32 groups", 8, 128, 128, three, HALF, False, groups=32)
    projection = Geometry.densifying(active, 4, three)
    rows, dense = meta(projection.rows_in, 256), meta(projection.rows_out, 192)
    w = meta(192, 256, 3, 3)
    yield Case("conv forward projection", lambda: triton.forward(rows, w, None, projection, 1))
    yield Case("conv grad-input projection", lambda: triton.grad_input(dense, w, projection, 1))
    yield Case("conv grad-weight projection", lambda: triton.grad_weight(dense, rows, projection, 1, w))
