"""Norms, pooling, gather and scatter, densify projection and loss against what PyTorch does on dense maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import spark_fast as sf
from bench.gpu.measure import (
    HALF,
    Peaks,
    compare,
    forced,
    own_backends,
    prove,
    prove_repeated,
    results_of,
)
from bench.gpu.section import NotAvailableError
from bench.layers import pairs
from bench.nets import plain_loss
from spark_fast.ops.conv import project
from spark_fast.ops.densify import gather_patches, scatter_patches
from spark_fast.ops.group_norm import group_norm
from spark_fast.ops.mlp import mlp
from spark_fast.ops.norm import batch_norm, layer_norm, layer_norm_scatter, layer_scale
from spark_fast.ops.patch_loss import patch_loss
from spark_fast.ops.pool import max_pool2d

Op = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """What `make` makes; `directions`: "forward", and "both" for forward and gradients of all inputs."""

    name: str
    make: Callable[[], Case]
    directions: Sequence[str] = ("forward", "both")


@dataclass(frozen=True)
class Case:
    """An op in two ways.

    Attributes:
        ours: of `inputs`; truth: the same of the same inputs in plain PyTorch, in any dtype.
        dense: what a dense network runs instead, of `maps`.
        terms: products in the longest sum of the output, then of each input's gradient.
        constant: inputs whose gradient nobody asks for.
        proof: other inputs for the proof.
    """

    op: str
    ours: Op
    truth: Op
    inputs: Sequence[torch.Tensor]
    dense: Op
    maps: Sequence[torch.Tensor]
    flops: float
    terms: Sequence[int]
    constant: Sequence[int] = ()
    proof: Sequence[torch.Tensor] | None = None


def specs(patches: sf.ActivePatches, tiny: bool) -> Iterator[Spec]:
    """One case's tensors are there at a time."""

    def few(channels: int) -> int:
        return min(channels, 8) if tiny else channels

    for side, channels in ((8, 64), (8, 256), (2, 1024)):
        make = partial(_batch_norm, patches, side, few(channels))
        yield Spec(f"batch norm + ReLU, side {side}, {channels} channels", make)
    make = partial(_batch_norm, patches, 8, few(256), shortcut=True)
    yield Spec("batch norm + shortcut + ReLU, side 8, 256 channels", make)
    for side, channels in ((8, 128), (2, 512)):
        yield Spec(f"MLP, side {side}, {channels} channels", partial(_mlp, patches, side, few(channels)))
    yield Spec("layer scale + shortcut, side 8, 128 channels", partial(_layer_scale, patches, 8, few(128)))
    for side, channels in ((8, 128), (2, 512)):
        yield Spec(f"layer norm, side {side}, {channels} channels", partial(_layer_norm, patches, side, few(channels)))
    for side, channels in ((8, 256), (1, 2048)):
        yield Spec(f"group norm, side {side}, {channels} channels", partial(_group_norm, patches, side, few(channels)))
    make = partial(_layer_norm_to_maps, patches, 1, few(768))
    yield Spec("layer norm to maps around a token, side 1, 768 channels", make)
    yield Spec("max pool 3x3/2, side 16, 64 channels", partial(_pool, patches, 16, few(64)))
    yield Spec("gather of the images", partial(_gather, patches, 32), ("forward",))
    yield Spec("scatter around a token, side 8, 256 channels", partial(_scatter, patches, 8, few(256)))
    yield Spec("densify projection, side 8, 256 to 96", partial(_projection, patches, 8, few(256), few(96)))
    yield Spec("patch loss", partial(_loss, patches, 32))


def _rows(patches: sf.ActivePatches, side: int, channels: int) -> torch.Tensor:
    return torch.randn(patches.rows(side), channels, device=patches.device).to(HALF)


def _map(rows: torch.Tensor, patches: sf.ActivePatches, side: int) -> torch.Tensor:
    """Zero-filled, by indexing alone: any dtype, differentiable."""
    return _filled(rows, rows.new_zeros(rows.shape[1]), patches, side)


def _filled(rows: torch.Tensor, fill: torch.Tensor, patches: sf.ActivePatches, side: int) -> torch.Tensor:
    image, row, col = patches.index
    (gh, gw), channels = patches.grid, rows.shape[1]
    cells = fill.expand(patches.batch, gh, gw, side, side, channels)
    cells = cells.index_put((image, row, col), rows.view(-1, side, side, channels))
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(patches.batch, channels, gh * side, gw * side)


def _active_rows(maps: torch.Tensor, patches: sf.ActivePatches, side: int) -> torch.Tensor:
    image, row, col = patches.index
    batch, channels = maps.shape[:2]
    cells = maps.view(batch, channels, patches.grid[0], side, patches.grid[1], side).permute(0, 2, 4, 3, 5, 1)
    return cells[image, row, col].reshape(-1, channels)


def _last(maps: torch.Tensor) -> torch.Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _batch_norm(patches: sf.ActivePatches, side: int, channels: int, shortcut: bool = False) -> Case:
    x = _rows(patches, side, channels)
    weight, bias = (torch.rand(channels, device=x.device) + 0.5 for _ in range(2))
    skip = [_rows(patches, side, channels)] * shortcut

    def ours(x, weight, bias, residual=None):
        return batch_norm(x, None, None, weight, bias, training=True, activation="relu", residual=residual)

    def truth(x, weight, bias, residual=None):
        normal = F.batch_norm(x, None, None, weight, bias, training=True)
        return F.relu(normal if residual is None else normal + residual)

    maps = (_last(_map(x, patches, side)), weight, bias, *(_last(_map(t, patches, side)) for t in skip))
    rows = x.shape[0]
    terms = (1, channels, rows, rows, *[1] * shortcut)
    return Case("norm", ours, truth, (x, weight, bias, *skip), truth, maps, 0, terms)


def _mlp(patches: sf.ActivePatches, side: int, channels: int) -> Case:
    x, hidden = _rows(patches, side, channels), 4 * channels
    weight1 = (torch.randn(hidden, channels, device=x.device) / channels**0.5).to(HALF)
    weight2 = (torch.randn(channels, hidden, device=x.device) / hidden**0.5).to(HALF)
    bias1, bias2 = (torch.randn(n, device=x.device).to(HALF) for n in (hidden, channels))

    def truth(x, weight1, bias1, weight2, bias2):
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    weights = (weight1, bias1, weight2, bias2)
    pixels = _last(_map(x, patches, side)).permute(0, 2, 3, 1).contiguous()
    rows = x.shape[0]
    terms = (channels + hidden, channels + hidden, rows + channels, rows, rows + channels, rows)
    flops = 3 * 4 * rows * channels * hidden
    return Case("mlp", mlp, truth, (x, *weights), truth, (pixels, *weights), flops, terms)


def _layer_scale(patches: sf.ActivePatches, side: int, channels: int) -> Case:
    """In the dtypes of a ConvNeXt under autocast."""
    x, skip = _rows(patches, side, channels), _rows(patches, side, channels).float()
    weight = torch.rand(channels, device=x.device) + 0.5

    def ours(x, weight, skip):
        return layer_scale(x, weight, skip)

    def truth(x, weight, skip):
        return x * weight + skip

    pixels = [_last(_map(t, patches, side)).permute(0, 2, 3, 1).contiguous() for t in (x, skip)]
    maps, terms = (pixels[0], weight, pixels[1]), (2, 1, x.shape[0], 1)
    return Case("norm", ours, truth, (x, weight, skip), truth, maps, 0, terms)


def _layer_norm(patches: sf.ActivePatches, side: int, channels: int) -> Case:
    x = _rows(patches, side, channels)
    weight, bias = (torch.rand(channels, device=x.device).to(HALF) + 0.5 for _ in range(2))

    def truth(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    pixels = _last(_map(x, patches, side)).permute(0, 2, 3, 1).contiguous()
    rows = x.shape[0]
    maps, terms = (pixels, weight, bias), (channels, channels, rows, rows)
    return Case("norm", layer_norm, truth, (x, weight, bias), truth, maps, 0, terms)


def _group_norm(patches: sf.ActivePatches, side: int, channels: int) -> Case:
    x = _rows(patches, side, channels)
    weight, bias = (torch.rand(channels, device=x.device).to(HALF) + 0.5 for _ in range(2))
    groups = min(32, channels // 2)

    def ours(x, weight, bias):
        return group_norm(x, patches, side, groups, weight, bias)

    def truth(x, weight, bias):
        images = x.view(patches.batch, -1, channels).transpose(1, 2)
        return F.group_norm(images, groups, weight, bias).transpose(1, 2).reshape(x.shape)

    def dense(maps, weight, bias):
        return F.group_norm(maps, groups, weight, bias)

    maps, rows = (_last(_map(x, patches, side)), weight, bias), x.shape[0]
    values = rows // patches.batch * channels // groups
    return Case("group_norm", ours, truth, (x, weight, bias), dense, maps, 0, (values, values, rows, rows))


def _layer_norm_to_maps(patches: sf.ActivePatches, side: int, channels: int) -> Case:
    x = _rows(patches, side, channels)
    fill, weight, bias = (torch.randn(channels, device=x.device).to(HALF) for _ in range(3))
    mask = F.interpolate(patches.active[:, None].float(), scale_factor=side).bool()

    def ours(x, fill, weight, bias):
        return layer_norm_scatter(x, patches, side, fill, weight, bias)

    def truth(x, fill, weight, bias):
        return _filled(F.layer_norm(x, x.shape[1:], weight, bias), fill, patches, side)

    def dense(maps, fill, weight, bias):
        pixels = F.layer_norm(maps.permute(0, 2, 3, 1), (channels,), weight, bias)
        return torch.where(mask, pixels.permute(0, 3, 1, 2), fill.view(-1, 1, 1))

    maps = (_last(_map(x, patches, side)), fill, weight, bias)
    rows = x.shape[0]
    terms = (channels, channels, mask.numel(), rows, rows)
    return Case("norm", ours, truth, (x, fill, weight, bias), dense, maps, 0, terms)


def _pool(patches: sf.ActivePatches, side: int, channels: int) -> Case:
    x = _rows(patches, side, channels)

    def ours(x):
        return max_pool2d(x, patches, side, 3, 2, 1)[0]

    def dense(maps):
        return F.max_pool2d(maps, 3, 2, 1)

    def truth(x):
        return _active_rows(dense(_map(x, patches, side)), patches, side // 2)

    # In half precision equal values abound, and which of them gets the gradient is a matter of order: a channel of the
    # proof has each value once.
    order = torch.randperm(x.shape[0], device=x.device) - x.shape[0] // 2 + 0.5
    distinct = torch.stack([order.roll(channel) for channel in range(channels)], 1).float()
    maps = (_last(_map(x, patches, side)),)
    return Case("pool", ours, truth, (x,), dense, maps, 0, (1, 4), proof=(distinct,))


def _gather(patches: sf.ActivePatches, side: int) -> Case:
    height, width = (g * side for g in patches.grid)
    images = torch.randn(patches.batch, 3, height, width, device=patches.device)
    mask = F.interpolate(patches.active[:, None].float(), scale_factor=side)

    def ours(images):
        return gather_patches(images, patches)

    def truth(images):
        return _active_rows(images, patches, side)

    return Case("densify", ours, truth, (images,), lambda images: images * mask, (images,), 0, (1,))


def _scatter(patches: sf.ActivePatches, side: int, channels: int) -> Case:
    x, fill = _rows(patches, side, channels), torch.randn(channels, device=patches.device).to(HALF)
    mask = F.interpolate(patches.active[:, None].float(), scale_factor=side).bool()

    def ours(x, fill):
        return scatter_patches(x, patches, side, fill)

    def truth(x, fill):
        return _filled(x, fill, patches, side)

    def dense(maps, fill):
        return torch.where(mask, maps, fill.view(-1, 1, 1))

    maps = (_last(_map(x, patches, side)), fill)
    return Case("densify", ours, truth, (x, fill), dense, maps, 0, (1, 1, mask.numel()))


def _projection(patches: sf.ActivePatches, side: int, channels: int, width: int) -> Case:
    x, token = _rows(patches, side, channels), torch.randn(channels, device=patches.device).to(HALF)
    weight = (torch.randn(width, channels, 3, 3, device=x.device) / (9 * channels) ** 0.5).to(HALF)
    mask = F.interpolate(patches.active[:, None].float(), scale_factor=side).bool()

    def ours(x, token, weight):
        return project(x, token, patches, side, weight)

    def truth(x, token, weight):
        return F.conv2d(_filled(x, token, patches, side), weight, padding=1)

    def dense(maps, token, weight):
        return F.conv2d(torch.where(mask, maps, token.view(-1, 1, 1)), weight, padding=1)

    everywhere, depth = mask.numel(), 9 * channels
    flops = 3 * 2 * pairs_to_all(patches, side) * channels * width
    maps = (_last(_map(x, patches, side)), token, _last(weight))
    terms = (depth, 9 * width, everywhere * 9 * width, everywhere)
    return Case("conv", ours, truth, (x, token, weight), dense, maps, flops, terms)


def pairs_to_all(patches: sf.ActivePatches, side: int) -> int:
    """(output pixel, active input pixel) pairs of a 3x3 window whose outputs are all pixels."""
    everything = torch.ones_like(patches.active).cpu()
    inside = pairs(everything, side, 3, 1, 1)
    return round(inside * float(patches.active.double().mean()))


def _loss(patches: sf.ActivePatches, side: int) -> Case:
    shape = (patches.batch, 3, *(g * side for g in patches.grid))
    prediction, images = (torch.randn(shape, device=patches.device) for _ in range(2))
    active, values = patches.active, 3 * side * side

    def plain(prediction, images):
        return plain_loss(prediction, images, active)

    def ours(prediction, images):
        return patch_loss(prediction, images, patches)

    inputs, terms = (prediction, images), (values * active.numel(), values)
    return Case("patch_loss", ours, plain, inputs, plain, inputs, 0, terms, constant=(1,))


def measure(case: Case, direction: str, peaks: Peaks) -> dict:
    """ "forward", or "both": forward and gradients of all inputs."""
    device = case.inputs[0].device
    found, absent = own_backends(case.op, device, case.inputs[0].dtype)
    sides, truths = {}, None
    for name in found:
        ours = forced(case.op, name, case.ours)
        try:
            sides[name] = _runner(ours, case.inputs, case, direction)
            sides[name]()
        except sf.BackendError as error:
            absent[name] = str(error)
            del sides[name]
            continue
        truths = truths or _truths(case, direction)
        proof, what = _runner(ours, case.proof or case.inputs, case, direction), f"{name}, {case.op}"
        results = results_of(proof)
        try:
            prove(what, results, *truths, case.terms[: len(results)])
            if name != "library":
                prove_repeated(what, proof, results)
        except AssertionError as error:
            if name != "library":  # PyTorch's own kernels: timed as they are, and it is said
                raise
            absent["library is inexact"] = str(error)
    if not sides:
        raise NotAvailableError(f"no backend takes it: {absent}")
    dense = {"dense": _runner(case.dense, case.maps, case, direction)}
    size = sum(t.nbytes for t in case.inputs) + case.ours(*case.inputs).nbytes
    flops = case.flops if direction == "both" else case.flops / 3
    entry = compare(sides, dense, device, peaks, flops, size * (2 if direction == "both" else 1))
    return dict(op=case.op, direction=direction, **entry, absent=absent)


def run_once(case: Case) -> None:
    """Forward and backward by the backend that is preferred, of the inputs that are timed and of those of the proof."""
    for inputs in filter(None, (case.inputs, case.proof)):
        _runner(case.ours, inputs, case, "both")()


def _truths(case: Case, direction: str) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """PyTorch's results in the inputs' dtype, and in float64."""
    inputs = case.proof or case.inputs
    theirs = _runner(case.truth, inputs, case, direction)()
    return theirs, _runner(case.truth, [t.double() for t in inputs], case, direction)()


def _runner(
    function: Op, inputs: Sequence[torch.Tensor], case: Case, direction: str
) -> Callable[[], Sequence[torch.Tensor]]:
    both = direction == "both"
    leaves = [t.detach().requires_grad_(both and i not in case.constant) for i, t in enumerate(inputs)]
    wanted = [t for t in leaves if t.requires_grad]
    if not both:
        return lambda: [function(*leaves)]
    with torch.no_grad():
        like = function(*leaves)
    generator = torch.Generator(like.device).manual_seed(1)
    weights = torch.randn(like.shape, device=like.device, generator=generator).to(HALF).to(like)  # equal in all dtypes

    def run() -> Sequence[torch.Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, wanted, weights)]

    return run
