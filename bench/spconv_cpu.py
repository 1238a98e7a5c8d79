"""spconv's CPU build, made to run forward and backward without a GPU. Importing this needs spconv."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from collections.abc import Iterator

import spconv.pytorch as spconv
import torch
from spconv.core import ConvAlgo
from spconv.pytorch import ops

from bench.layers import Problem

VERSION = importlib.metadata.version("spconv")


@contextlib.contextmanager
def _no_cuda_stream() -> Iterator[None]:
    """ops.indice_conv_backward reads the current CUDA stream before it looks at the device; a CPU pass ignores it."""
    original = ops.get_current_stream
    ops.get_current_stream = lambda: 0
    try:
        yield
    finally:
        ops.get_current_stream = original


class Peer:
    """A Problem's convolution as a spconv layer. Only `ConvAlgo.Native` has a CPU implementation."""

    def __init__(self, problem: Problem):
        self.problem, layer = problem, problem.layer
        settings = dict(bias=False, algo=ConvAlgo.Native, indice_key="layer" if layer.stride == 1 else None)
        if layer.stride == 1:
            self.conv = spconv.SubMConv2d(layer.channels, layer.out, layer.kernel, **settings)
        else:
            self.conv = spconv.SparseConv2d(
                layer.channels, layer.out, layer.kernel, layer.stride, layer.padding, **settings
            )  # fmt: skip
        self.conv.weight.data = problem.w.permute(0, 2, 3, 1).contiguous()  # (O, kh, kw, C)
        (gh, gw), side = problem.patches.grid, layer.side
        self.shape, self.coords = [gh * side, gw * side], coordinates(problem.patches, side)
        self.x = problem.x.clone().requires_grad_()
        output = self._forward(rulebook=True)
        self.cached = output.indice_dict
        self.shared, self.grad = self._align(output)

    def _forward(self, rulebook: bool) -> spconv.SparseConvTensor:
        tensor = spconv.SparseConvTensor(self.x, self.coords, self.shape, self.problem.patches.batch)
        if not rulebook:
            tensor.indice_dict = self.cached
        return self.conv(tensor)

    def _align(self, output: spconv.SparseConvTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where our output rows are among spconv's, and our gradient there (0 at outputs that only spconv has)."""
        width = output.spatial_shape[1]
        height = output.spatial_shape[0]

        def key(coords: torch.Tensor) -> torch.Tensor:
            return (coords[:, 0].long() * height + coords[:, 1]) * width + coords[:, 2]

        order = key(output.indices).argsort()
        ours = key(coordinates(self.problem.patches, self.problem.side_out))
        shared = order[torch.searchsorted(key(output.indices)[order], ours)]
        grad = torch.zeros_like(output.features)
        grad[shared] = self.problem.grad
        return shared, grad

    def run(self, rulebook: bool = False) -> tuple[torch.Tensor, ...]:
        """Forward and both gradients; without `rulebook` with the index pairs of an earlier call (submanifold only)."""
        output = self._forward(rulebook).features
        with _no_cuda_stream(), contextlib.redirect_stderr(io.StringIO()):
            return (output, *torch.autograd.grad(output, (self.x, self.conv.weight), self.grad))

    def results(self) -> list[torch.Tensor]:
        """Our rows and our weight's order, float64."""
        output, grad_input, grad_weight = (t.detach().double() for t in self.run(rulebook=True))
        return [output[self.shared].flatten(), grad_input.flatten(), grad_weight.permute(0, 3, 1, 2).flatten()]


def coordinates(patches, side: int) -> torch.Tensor:
    """(image, y, x) of every row, int32 (P * side * side, 3)."""
    image, row, col = (i[:, None, None] for i in patches.index)
    inside = torch.arange(side)
    y, x = row * side + inside[:, None], col * side + inside
    shape = (patches.count, side, side)
    return torch.stack([t.expand(shape).flatten() for t in (image, y, x)], 1).int()
