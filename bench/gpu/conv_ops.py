"""Convolutions of ResNet-50 and ConvNeXt-B against cuDNN on the zero-filled map of the same layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import spark_fast as sf
from bench.gpu.measure import HALF, Peaks, compare, own_backends, prove, prove_repeated, results_of
from bench.gpu.section import NotAvailableError
from bench.layers import Layer, pairs
from spark_fast.ops.window import Geometry, Window

RESNET = [Layer("resnet", side, c, c) for side, c in ((8, 64), (4, 128), (2, 256), (1, 512))]
DEPTHWISE = [
    Layer("convnext", side, c, c, 7, groups=c) for side, c in ((8, 128), (4, 256), (2, 512), (1, 1024))
]  # fmt: skip
OTHERS = [
    *(Layer("resnet", side, c, c, stride=2) for side, c in ((8, 128), (4, 256), (2, 512))),
    Layer("resnet", 32, 3, 64, kernel=7, stride=2),
    Layer("convnext", 32, 3, 128, kernel=4, stride=4),
    *(Layer("convnext", side, c, 2 * c, 2, 2) for side, c in ((8, 128), (4, 256), (2, 512))),
]
LAYERS = [*RESNET, *DEPTHWISE, *OTHERS]
DIRECTIONS = ("forward", "grad_input", "grad_weight")
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def name_of(layer: Layer, direction: str) -> str:
    groups = "depthwise " if layer.groups > 1 else ""
    return f"{groups}{layer.name} {direction}"


def cases() -> Iterator[tuple[Layer, str]]:
    for layer in LAYERS:
        for direction in DIRECTIONS:
            if direction != "grad_input" or layer.channels > 3:  # nobody asks for the gradient of the images
                yield layer, direction


class Problem:
    """A layer's tensors in half precision on random active patches."""

    def __init__(self, layer: Layer, patches: sf.ActivePatches, tiny: bool):
        self.layer = layer = layer.shrunk() if tiny else layer
        self.patches = patches
        self.window = Window((layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 2)
        self.geometry = Geometry.of(patches, layer.side, self.window)
        device = patches.device
        taps = layer.kernel**2 * layer.channels // layer.groups
        self.x = torch.randn(self.geometry.rows_in, layer.channels, device=device).to(HALF)
        self.grad = torch.randn(self.geometry.rows_out, layer.out, device=device).to(HALF)
        shape = (layer.out, layer.channels // layer.groups, layer.kernel, layer.kernel)
        self.w = (torch.randn(shape, device=device) / taps**0.5).to(HALF)
        self.op = "depthwise" if 1 < layer.groups == layer.channels else "conv"

    @property
    def case(self) -> tuple:
        """What the op's api hands to `backend.select`."""
        groups = (self.layer.groups,) if self.op == "conv" else ()
        return (self.x, self.w, self.geometry, *groups)

    def ours(self, run, direction: str) -> Callable[[], torch.Tensor]:
        groups = self.case[3:]
        if direction == "forward":
            return lambda: run.forward(self.x, self.w, None, self.geometry, *groups)
        if direction == "grad_input":
            return lambda: run.grad_input(self.grad, self.w, self.geometry, *groups)
        return lambda: run.grad_weight(self.grad, self.x, self.geometry, *groups, self.w)

    def dense(
        self, direction: str, dtype: torch.dtype = HALF, memory_format: torch.memory_format = torch.channels_last
    ) -> Callable[[], torch.Tensor]:
        """The same direction by PyTorch on the zero-filled maps."""
        x, grad, w = self.map_of(self.x), self.map_of(self.grad), self.w
        x, grad, w = (t.to(dtype, memory_format=memory_format) for t in (x, grad, w))
        stride, padding, groups = self.window.stride, self.window.padding, self.layer.groups
        if direction == "forward":
            return lambda: torch.ops.aten.convolution(x, w, None, stride, padding, (1, 1), False, (0, 0), groups)
        wanted = [direction == "grad_input", direction == "grad_weight", False]
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, w, None, stride, padding, (1, 1), False, (0, 0), groups, wanted
        )[DIRECTIONS.index(direction) - 1]

    def map_of(self, rows: torch.Tensor) -> torch.Tensor:
        side = self.geometry.side_in if rows is self.x else self.geometry.side_out
        return sf.SparseTensor(rows, self.patches, side).to_dense()

    def rows(self, result: torch.Tensor, direction: str) -> torch.Tensor:
        """A dense result as ours: rows of active pixels, or the weight's gradient as it is."""
        if direction == "grad_weight":
            return result
        return sf.SparseTensor.from_dense(result, self.patches).features

    def terms(self, direction: str) -> int:
        layer = self.layer
        if direction == "grad_weight":
            return self.geometry.rows_out
        return layer.kernel**2 * (layer.channels if direction == "forward" else layer.out) // layer.groups

    @property
    def flops(self) -> int:
        layer = self.layer
        found = pairs(self.patches.active.cpu(), layer.side, layer.kernel, layer.stride, layer.padding)
        return 2 * found * layer.channels // layer.groups * layer.out

    @property
    def bytes(self) -> int:
        return HALF.itemsize * (self.x.numel() + self.grad.numel() + self.w.numel())


def measure(problem: Problem, direction: str, peaks: Peaks) -> dict:
    """One direction of a layer by every backend that takes it, proven and timed."""
    layer, device = problem.layer, problem.x.device
    found, absent = own_backends(problem.op, device, HALF, *problem.case)
    if set(found) - {"library"}:
        found.pop("library", None)  # the dense form itself
    if not found:
        raise NotAvailableError(f"op '{problem.op}' has no backend of its own on {device.type}: {absent}")
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # the search for the fastest algorithm would outlast the proof
    oracle = problem.rows(problem.dense(direction, torch.float64)(), direction)
    torch.backends.cudnn.benchmark = benchmark
    theirs = problem.rows(problem.dense(direction)(), direction)
    sides = {name: problem.ours(run, direction) for name, run in found.items()}
    for name, run in sides.items():
        what = f"{name} {name_of(layer, direction)}"
        ours = results_of(lambda run=run: [run()])
        prove(what, ours, [theirs], [oracle], [problem.terms(direction)])
        if name != "library":
            prove_repeated(what, lambda run=run: [run()], ours)
    del oracle, theirs
    depthwise = problem.op == "depthwise"
    forms = MEMORY_FORMATS if depthwise else {"channels_last": torch.channels_last}
    dense = {f"dense {name}": problem.dense(direction, HALF, form) for name, form in forms.items()}
    entry = compare(sides, dense, device, peaks, problem.flops, problem.bytes, tensor_cores=not depthwise)
    return dict(op=problem.op, direction=direction, rows=problem.x.shape[0], **entry, absent=absent)
