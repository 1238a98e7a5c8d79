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
    active = patches()
    for part in (convolution, depthwise, pooling, norms, copies, losses):
        yield from part(active)


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


def norms(active: sf.ActivePatches) -> Iterator[Case]:
    from spark_fast.ops.norm import configs, triton

    def batch(side, channels, activation, dtype, every_config, with_residual=False):
        x, c = meta(active.rows(side), channels, dtype=dtype), meta(channels, dtype=FLOAT)
        residual = (x,) if with_residual else ()

        def run():
            for training in (True, False):
                triton.batch_norm_forward(x, c, c, c, c, training, 0.1, 1e-5, activation, *residual)
                triton.batch_norm_backward(x, x, c, c, c, c, training, activation, *(residual if activation else ()))

        name = f"{channels} channels, {activation}, {str(dtype).removeprefix('torch.')}"
        yield Case(f"batch norm {'and residual ' * with_residual}{name}", run, configs.BATCH if every_config else ())

    def layer(side, channels, dtype, every_config):
        x, c = meta(active.rows(side), channels, dtype=dtype), meta(channels, dtype=FLOAT)
        m = meta(x.shape[0], dtype=FLOAT)

        def run():
            triton.layer_norm_forward(x, c, c, 1e-6)
            triton.layer_norm_backward(x, x, c, c, m, m)

        name = f"layer norm {channels} channels, {str(dtype).removeprefix('torch.')}"
        yield Case(name, run, configs.LAYER if every_config else ())

    def to_maps(kind, side, channels, dtype, every_config):
        x, c, fill = (
            meta(active.rows(side), channels, dtype=dtype),
            meta(channels, dtype=FLOAT),
            meta(channels, dtype=dtype),
        )
        grad = meta(256, 7 * side, 7 * side, channels, dtype=dtype).permute(0, 3, 1, 2)
        forward, backward = (active, side, fill), (active, side, None)
        m = meta(x.shape[0], dtype=FLOAT)

        def run():
            if kind == "layer":
                triton.layer_norm_forward(x, c, c, 1e-6, maps=forward)
                triton.layer_norm_backward(grad, x, c, c, m, m, maps=backward)
                return
            for training in (True, False):
                triton.batch_norm_forward(x, c, c, c, c, training, 0.1, 1e-5, None, maps=forward)
                triton.batch_norm_backward(grad, x, c, c, c, c, training, None, maps=backward)

        name = f"{kind} norm to maps, {channels} channels, side {side}, {str(dtype).removeprefix('torch.')}"
        yield Case(name, run, (configs.LAYER if kind == "layer" else configs.BATCH) if every_config else ())

    yield from batch(16, 64, None, HALF, True)
    yield from batch(16, 64, "relu", FLOAT, True)
    yield from batch(1, 2048, "relu", HALF, True, with_residual=True)
    yield from batch(8, 256, "relu", torch.float16, False, with_residual=True)
    yield from batch(8, 192, None, HALF, False, with_residual=True)
    yield from batch(8, 24, "relu6", HALF, False)
    for channels, side in ((128, 8), (384, 2), (1024, 1)):
        yield from layer(side, channels, HALF, True)
    yield from layer(8, 128, FLOAT, False)
    yield from layer(1, 1024, FLOAT, True)
    yield from layer(1, 768, torch.float16, False)
    yield from layer(1, 3072, HALF, False)
    yield from layer(1, 5000, HALF, False)
    for kind in ("batch", "layer"):
        for dtype in (HALF, FLOAT, torch.float16):
            yield from to_maps(kind, 1, 768, dtype, dtype != torch.float16)
        yield from to_maps(kind, 2, 1024, HALF, False)
    yield from to_maps("layer", 1, 5000, HALF, False)


def copies(active: sf.ActivePatches) -> Iterator[Case]:
    from spark_fast.ops.densify import configs, triton

    for channels, side, dtype in ((3, 32, FLOAT), (3, 32, HALF), (768, 1, HALF), (96, 8, FLOAT)):
        rows, fill = meta(active.rows(side), channels, dtype=dtype), meta(channels, dtype=dtype)
        images = meta(256, channels, 7 * side, 7 * side, dtype=dtype)
        last = meta(256, 7 * side, 7 * side, channels, dtype=dtype).permute(0, 3, 1, 2)

        def run(rows=rows, fill=fill, images=images, last=last, side=side):
            triton.gather(images, active)
            triton.gather(last, active)
            triton.scatter(rows, active, side, None)
            triton.scatter(rows, active, side, fill)
            triton.sum_masked(last, active)

        yield Case(f"gather, scatter, sum {channels} channels, side {side}, {str(dtype).removeprefix('torch.')}", run,
                   tuple(configs.COPY) if channels in (3, 768) and dtype == HALF else ())  # fmt: skip


def losses(active: sf.ActivePatches) -> Iterator[Case]:
    from spark_fast.ops.patch_loss import configs, triton

    for dtype, of_images in ((HALF, FLOAT), (HALF, HALF), (torch.float16, FLOAT), (FLOAT, FLOAT)):
        prediction = meta(256, 224, 224, 3, dtype=dtype).permute(0, 3, 1, 2)
        images = meta(256, 3, 224, 224, dtype=of_images)

        def run(prediction=prediction, images=images):
            triton.forward(prediction, images, active)
            triton.grad_prediction(meta(dtype=FLOAT), prediction, images, active)

        names = [str(d).removeprefix("torch.") for d in (dtype, of_images)]
        yield Case(f"patch loss, prediction {names[0]}, images {names[1]}", run,
                   tuple(configs.PATCH) if dtype == of_images else ())  # fmt: skip


def depthwise(active: sf.ActivePatches) -> Iterator[Case]:
    from spark_fast.ops.depthwise import configs, triton

    def directions(name, side, channels, window, dtype=HALF, every_config=False):
        geometry = Geometry.of(active, side, window)
        x, grad = meta(geometry.rows_in, channels, dtype=dtype), meta(geometry.rows_out, channels, dtype=dtype)
        w, b = meta(channels, 1, *window.kernel, dtype=dtype), meta(channels, dtype=dtype)
        gather = tuple(configs.GATHER) if every_config else ()
        product = tuple(configs.PRODUCT) if every_config else ()
        name = f"{name}, {channels}, side {side}, {str(dtype).removeprefix('torch.')}"
        yield Case(f"depthwise forward {name}", lambda: triton.forward(x, w, b, geometry), gather)
        yield Case(f"depthwise grad-input {name}", lambda: triton.grad_input(grad, w, geometry), gather)
        yield Case(f"depthwise grad-weight {name}", lambda: triton.grad_weight(grad, x, geometry, w), product)

    seven = Window((7, 7), (1, 1), (3, 3))
    for side, channels in ((8, 128), (4, 256), (2, 512), (1, 1024)):
        yield from directions("7x7", side, channels, seven, HALF, side != 2)
    for dtype in (torch.float16, FLOAT):
        yield from directions("7x7", 8, 128, seven, dtype, dtype == FLOAT)
    yield from directions("3x3", 16, 32, Window((3, 3), (1, 1), (1, 1)))  # MobileNet, EfficientNet
    yield from directions("3x3/2", 16, 96, Window((3, 3), (2, 2), (1, 1)), HALF, True)
    yield from directions("3x3/2", 16, 96, Window((3, 3), (2, 2), (1, 1)), FLOAT)
    yield from directions("5x5/2", 8, 144, Window((5, 5), (2, 2), (2, 2)))
    yield from directions("5x5", 1, 1152, Window((5, 5), (1, 1), (2, 2)))
    yield from directions("31x31", 8, 128, Window((31, 31), (1, 1), (15, 15)), HALF, True)  # RepLKNet
    yield from directions("31x31", 8, 128, Window((31, 31), (1, 1), (15, 15)), FLOAT)
    yield from directions("9x9/9", 9, 64, Window((9, 9), (9, 9)))  # grad-input row by row


def pooling(active: sf.ActivePatches) -> Iterator[Case]:
    from spark_fast.ops.pool import configs, triton

    def directions(name, side, channels, window, dtype=HALF, every_config=False):
        geometry = Geometry.of(active, side, window)
        x, grad = meta(geometry.rows_in, channels, dtype=dtype), meta(geometry.rows_out, channels, dtype=dtype)
        argmax = meta(geometry.rows_out, channels, dtype=torch.int16)
        tiles = tuple(configs.TILES) if every_config else ()
        name = f"{name}, {channels}, side {side}, {str(dtype).removeprefix('torch.')}"
        yield Case(f"max pool forward {name}", lambda: triton.max_forward(x, geometry), tiles)
        yield Case(f"max pool grad-input {name}", lambda: triton.max_grad_input(grad, argmax, geometry), tiles)

    stem = Window((3, 3), (2, 2), (1, 1))
    for dtype in (HALF, torch.float16, FLOAT):
        yield from directions("3x3/2", 16, 64, stem, dtype, dtype != torch.float16)  # ResNet-50
    yield from directions("2x2/2", 8, 128, Window((2, 2), (2, 2)))
    yield from directions("3x3", 4, 256, Window((3, 3), (1, 1), (1, 1)), HALF, True)
    yield from directions("13x13", 8, 64, Window((13, 13), (1, 1), (6, 6)), HALF, True)
    yield from directions("13x13", 8, 64, Window((13, 13), (1, 1), (6, 6)), FLOAT)
    yield from directions("9x9/9", 9, 64, Window((9, 9), (9, 9)))  # grad-input row by row
