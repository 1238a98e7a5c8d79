"""The launches of the Triton kernels on layers of ResNet-50 and ConvNeXt-B (256 images, 224 px, 20 of 49 patches)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import spark_fast as sf
from spark_fast.ops.tuning import Config
from spark_fast.ops.window import Geometry, Window

FLOAT = torch.float32
DTYPES = (torch.bfloat16, torch.float16, FLOAT)


@dataclass(frozen=True)
class Case:
    """A call that launches kernels on "meta" tensors of a dtype; `configs`: run it with each of them too."""

    name: str
    dtype: torch.dtype
    run: Callable[[], object]
    configs: tuple[Config, ...] = ()


def patches() -> sf.ActivePatches:
    generator = torch.Generator().manual_seed(0)
    return sf.ActivePatches(sf.random_patch_mask(256, (7, 7), 0.6, generator), per_image=20)


def cases() -> Iterator[Case]:
    active = patches()
    for part in (convolution, depthwise, pooling, norms, group_norms, mlps, copies, losses):
        for dtype in DTYPES:
            yield from part(active, dtype)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def without_tf32(run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return run()

    return inside


def with_matmuls_in(precision: str, run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            return run()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return inside


def convolution(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.conv import configs, triton

    def directions(name, side, channels, out, window, every_config=False, groups=1):
        geometry = Geometry.of(active, side, window)
        x, grad = meta(geometry.rows_in, channels, dtype=dtype), meta(geometry.rows_out, out, dtype=dtype)
        w, b = meta(out, channels // groups, *window.kernel, dtype=dtype), meta(out, dtype=dtype)
        unfold = channels // groups <= triton.MOST_UNFOLDED
        gather = tuple(configs.gather_configs(dtype, "tf32", unfold)) if every_config else ()
        outer = tuple(configs.outer_configs(dtype, "tf32", unfold)) if every_config else ()
        name = f"{name}, {channels} -> {out}, side {side}, {short(dtype)}"
        found = [
            Case(f"conv forward {name}", dtype, lambda: triton.forward(x, w, b, geometry, groups), gather),
            Case(f"conv grad-input {name}", dtype, lambda: triton.grad_input(grad, w, geometry, groups), gather),
            Case(f"conv grad-weight {name}", dtype, lambda: triton.grad_weight(grad, x, geometry, groups, w), outer),
        ]
        if channels == 3:  # images need no gradient
            del found[1]
        yield from found
        if dtype == FLOAT:
            yield from (Case(f"{c.name} without TF32", dtype, without_tf32(c.run)) for c in found)

    three, down = Window((3, 3), (1, 1), (1, 1)), Window((3, 3), (2, 2), (1, 1))
    yield from directions("3x3", 8, 64, 64, three, True)
    yield from directions("3x3", 4, 128, 128, three)
    yield from directions("3x3", 2, 256, 256, three)
    yield from directions("3x3", 1, 512, 512, three, True)
    yield from directions("3x3/2", 8, 128, 128, down, True)
    yield from directions("1x1/2", 8, 256, 512, Window((1, 1), (2, 2)))
    yield from directions("7x7/2", 32, 3, 64, Window((7, 7), (2, 2), (3, 3)), True)
    yield from directions("4x4/4", 32, 3, 128, Window((4, 4), (4, 4)))
    yield from directions("2x2/2", 8, 128, 256, Window((2, 2), (2, 2)))
    yield from directions("3x3 in 32 groups", 8, 128, 128, three, groups=32)
    projection = Geometry.densifying(active, 4, three)
    rows, dense = meta(projection.rows_in, 256, dtype=dtype), meta(projection.rows_out, 192, dtype=dtype)
    w = meta(192, 256, 3, 3, dtype=dtype)
    name = f"projection, {short(dtype)}"
    yield Case(f"conv forward {name}", dtype, lambda: triton.forward(rows, w, None, projection, 1))
    yield Case(f"conv grad-input {name}", dtype, lambda: triton.grad_input(dense, w, projection, 1))
    yield Case(f"conv grad-weight {name}", dtype, lambda: triton.grad_weight(dense, rows, projection, 1, w))


def norms(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.norm import configs, triton

    def batch(side, channels, activation, every_config=False, with_residual=False):
        x, c = meta(active.rows(side), channels, dtype=dtype), meta(channels, dtype=FLOAT)
        residual = x if with_residual else None

        def run():
            triton.batch_statistics(x, c, c, 0.1, 1e-5)
            triton.batch_apply(x, residual, c, c, c, c, activation)
            for training in (True, False):
                kept = residual if activation else None
                triton.batch_norm_backward(x, x, kept, c, c, c, c, training, activation)

        name = f"batch norm {'and residual ' * with_residual}{channels} channels, {activation}, {short(dtype)}"
        yield Case(name, dtype, run, tuple(configs.BATCH) if every_config else ())

    def scale(side, channels):
        x, c = meta(active.rows(side), channels, dtype=dtype), meta(channels, dtype=FLOAT)
        wide = meta(*x.shape, dtype=FLOAT)  # a ConvNeXt's shortcuts under autocast

        def run():
            for residual in (wide, None):
                triton.batch_apply(x, residual, None, None, c, None, None, dtype=FLOAT)
            triton.batch_norm_backward(wide, x, None, None, None, c, None, False, None)

        return Case(f"layer scale {channels} channels, {short(dtype)}", dtype, run, tuple(configs.BATCH))

    def layer(side, channels, every_config=False):
        x, c = meta(active.rows(side), channels, dtype=dtype), meta(channels, dtype=FLOAT)
        m = meta(x.shape[0], dtype=FLOAT)

        def run():
            triton.layer_norm_forward(x, c, c, 1e-6)
            triton.layer_norm_backward(x, x, c, c, m, m)

        name = f"layer norm {channels} channels, {short(dtype)}"
        yield Case(name, dtype, run, tuple(configs.LAYER) if every_config else ())

    def to_maps(kind, side, channels, every_config=False):
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
            triton.batch_apply(x, None, c, c, c, c, None, maps=forward)
            for training in (True, False):
                triton.batch_norm_backward(grad, x, None, c, c, c, c, training, None, maps=backward)

        name = f"{kind} norm to maps, {channels} channels, side {side}, {short(dtype)}"
        shipped = configs.LAYER if kind == "layer" else configs.BATCH
        yield Case(name, dtype, run, tuple(shipped) if every_config else ())

    yield scale(8, 128)
    yield from batch(16, 64, None, True)
    yield from batch(16, 32, "silu", True)
    yield from batch(16, 64, "relu", True)
    yield from batch(1, 2048, "relu", True, with_residual=True)
    yield from batch(8, 256, "relu", with_residual=True)
    yield from batch(8, 192, None, with_residual=True)
    yield from batch(8, 24, "relu6")
    for channels, side in ((128, 8), (384, 2), (1024, 1)):
        yield from layer(side, channels, True)
    for channels in (768, 3072, 5000):
        yield from layer(1, channels)
    for kind in ("batch", "layer"):
        yield from to_maps(kind, 1, 768, True)
        yield from to_maps(kind, 2, 1024)
    yield from to_maps("layer", 1, 5000)


def mlps(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.mlp import configs, triton

    def directions(side, channels, every_config=False):
        width = 4 * channels
        x, hidden = (meta(active.rows(side), c, dtype=dtype) for c in (channels, width))
        w1, b1, w2, b2 = (meta(*s, dtype=dtype) for s in ((width, channels), (width,), (channels, width), (channels,)))

        def forward():
            for keep in (True, False):
                triton.forward(x, w1, b1, w2, b2, keep)

        def backward():
            for wanted in ([True] * 4, [True, True, False, False]):
                triton.backward(x, x, hidden, w1, w2, wanted)

        for direction, run, tiles in (("forward", forward, configs.FORWARD), ("backward", backward, configs.BACKWARD)):
            name = f"mlp {direction}, {channels} -> {width}, side {side}, {short(dtype)}"
            for precision in ("tf32", "ieee") if dtype == FLOAT else ("ieee",):
                shipped = tuple(configs.choices(tiles, dtype, precision)) if every_config else ()
                products = with_matmuls_in(precision, run)
                suffix = "" if dtype != FLOAT else " in TF32" if precision == "tf32" else " without TF32"
                yield Case(name + suffix, dtype, products, shipped)

    for side, channels in ((8, 128), (4, 256), (2, 512), (1, 1024)):
        yield from directions(side, channels, side in (8, 1))


def group_norms(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.group_norm import configs, triton

    def case(patches, side, channels, groups, every_config=False):
        x, c = meta(patches.rows(side), channels, dtype=dtype), meta(channels, dtype=FLOAT)
        m = meta(patches.batch, groups, dtype=FLOAT)

        def run():
            triton.forward(x, c, c, groups, 1e-5, patches, side)
            triton.backward(x, x, c, m, m, patches, side)

        counts = "unequal counts, " * (patches.per_image is None)
        name = f"group norm {channels} channels in {groups}, {counts}side {side}, {short(dtype)}"
        return Case(name, dtype, run, tuple(configs.TILES) if every_config else ())

    unequal = active.active.clone()
    unequal[0] = False
    unequal = sf.ActivePatches(unequal)
    for side, channels in ((8, 64), (1, 2048)):  # ResNetV2
        yield case(active, side, channels, 32, True)
    yield case(unequal, 8, 256, 32, True)
    yield case(active, 16, 32, 32, True)  # a U-Net with instance norm
    yield case(active, 1, 320, 320)
    yield case(active, 4, 96, 1)


def copies(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.densify import configs, triton

    for channels, side, every_config in ((3, 32, True), (768, 1, True), (96, 8, False)):
        rows, fill = meta(active.rows(side), channels, dtype=dtype), meta(channels, dtype=dtype)
        images = meta(256, channels, 7 * side, 7 * side, dtype=dtype)
        last = meta(256, 7 * side, 7 * side, channels, dtype=dtype).permute(0, 3, 1, 2)

        def run(rows=rows, fill=fill, images=images, last=last, side=side):
            triton.gather(images, active)
            triton.gather(last, active)
            triton.scatter(rows, active, side, None)
            triton.scatter(rows, active, side, fill)
            triton.sum_masked(last, active)

        name = f"gather, scatter, sum {channels} channels, side {side}, {short(dtype)}"
        yield Case(name, dtype, run, tuple(configs.COPY) if every_config else ())


def losses(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.patch_loss import configs, triton

    for of_images in dict.fromkeys((dtype, FLOAT)):
        prediction = meta(256, 224, 224, 3, dtype=dtype).permute(0, 3, 1, 2)
        images = meta(256, 3, 224, 224, dtype=of_images)

        def run(prediction=prediction, images=images):
            triton.forward(prediction, images, active)
            triton.grad_prediction(meta(dtype=FLOAT), prediction, images, active)

        name = f"patch loss, prediction {short(dtype)}, images {short(of_images)}"
        yield Case(name, dtype, run, tuple(configs.PATCH))


def depthwise(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.depthwise import configs, triton

    def directions(name, side, channels, window, every_config=False):
        geometry = Geometry.of(active, side, window)
        x, grad = meta(geometry.rows_in, channels, dtype=dtype), meta(geometry.rows_out, channels, dtype=dtype)
        w, b = meta(channels, 1, *window.kernel, dtype=dtype), meta(channels, dtype=dtype)
        gather = tuple(configs.GATHER) if every_config else ()
        product = tuple(configs.product_configs(dtype)) if every_config else ()
        name = f"{name}, {channels}, side {side}, {short(dtype)}"
        yield Case(f"depthwise forward {name}", dtype, lambda: triton.forward(x, w, b, geometry), gather)
        yield Case(f"depthwise grad-input {name}", dtype, lambda: triton.grad_input(grad, w, geometry), gather)
        yield Case(f"depthwise grad-weight {name}", dtype, lambda: triton.grad_weight(grad, x, geometry, w), product)

    seven = Window((7, 7), (1, 1), (3, 3))
    for side, channels in ((8, 128), (4, 256), (2, 512), (1, 1024)):
        yield from directions("7x7", side, channels, seven, True)
    yield from directions("3x3", 16, 32, Window((3, 3), (1, 1), (1, 1)))  # MobileNet, EfficientNet
    yield from directions("3x3/2", 16, 96, Window((3, 3), (2, 2), (1, 1)), True)
    yield from directions("5x5/2", 8, 144, Window((5, 5), (2, 2), (2, 2)))
    yield from directions("5x5", 1, 1152, Window((5, 5), (1, 1), (2, 2)))
    yield from directions("31x31", 8, 128, Window((31, 31), (1, 1), (15, 15)), True)  # RepLKNet
    yield from directions("9x9/9", 9, 64, Window((9, 9), (9, 9)))  # grad-input row by row


def pooling(active: sf.ActivePatches, dtype: torch.dtype) -> Iterator[Case]:
    from spark_fast.ops.pool import configs, triton

    def directions(name, side, channels, window, every_config=False):
        geometry = Geometry.of(active, side, window)
        x, grad = meta(geometry.rows_in, channels, dtype=dtype), meta(geometry.rows_out, channels, dtype=dtype)
        argmax = meta(geometry.rows_out, channels, dtype=torch.int16)
        tiles = tuple(configs.TILES) if every_config else ()
        name = f"{name}, {channels}, side {side}, {short(dtype)}"
        yield Case(f"max pool forward {name}", dtype, lambda: triton.max_forward(x, geometry), tiles)
        yield Case(f"max pool grad-input {name}", dtype, lambda: triton.max_grad_input(grad, argmax, geometry), tiles)

    yield from directions("3x3/2", 16, 64, Window((3, 3), (2, 2), (1, 1)), True)  # ResNet-50
    yield from directions("2x2/2", 8, 128, Window((2, 2), (2, 2)))
    yield from directions("3x3", 4, 256, Window((3, 3), (1, 1), (1, 1)), True)
    yield from directions("13x13", 8, 64, Window((13, 13), (1, 1), (6, 6)), True)
    yield from directions("9x9/9", 9, 64, Window((9, 9), (9, 9)))  # grad-input row by row
