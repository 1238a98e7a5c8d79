"""Convolution layers of the networks, as benchmark cases."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import spark_fast as sf
from bench.gather import tile_index, tiles, untile
from bench.harness import Side, Work
from bench.settings import BATCH, GRID, MASK_RATIO, TINY
from spark_fast.ops.conv import conv2d


@dataclass(frozen=True)
class Layer:
    """A convolution; `side` is a patch's side in pixels of its input. `linear`: nn.Linear on (B, H, W, C)."""

    net: str
    side: int
    channels: int
    out: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    linear: bool = False
    mask_ratio: float = MASK_RATIO

    @property
    def padding(self) -> int:
        return 0 if self.stride == self.kernel else self.kernel // 2

    @property
    def name(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        kind = "linear" if self.linear else f"{self.kernel}x{self.kernel}{stride}"
        return f"{kind}-side{self.side}-{self.channels}-{self.out}"

    def shrunk(self) -> Layer:
        """The same with few channels, for a tiny run."""
        groups = min(self.groups, 6)
        channels, out = (6, 6) if groups > 1 else (min(self.channels, 8), min(self.out, 8))
        return replace(self, channels=channels, out=out, groups=groups)


class Problem:
    """Tensors of a layer on random active patches, or on those given: packed rows, and the zero-filled map in
    channels-last."""

    def __init__(self, layer: Layer, patches: sf.ActivePatches | None = None):
        self.layer = layer = layer.shrunk() if TINY else layer
        self.patches = patches or sf.ActivePatches(sf.random_patch_mask(BATCH, GRID, layer.mask_ratio))
        self.side_out = layer.side // layer.stride
        self.x = torch.randn(self.patches.rows(layer.side), layer.channels)
        self.grad = torch.randn(self.patches.rows(self.side_out), layer.out)
        kernel = (layer.kernel, layer.kernel)
        self.w = torch.randn(layer.out, layer.channels // layer.groups, *kernel) / (layer.kernel**2 * layer.channels)

    def dense(self, rows: torch.Tensor) -> torch.Tensor:
        side = self.layer.side if rows is self.x else self.side_out
        return sf.SparseTensor(rows, self.patches, side).to_dense()

    def rows(self, map_: torch.Tensor) -> torch.Tensor:
        return sf.SparseTensor.from_dense(map_, self.patches).features

    def sides(self) -> dict[str, Side]:
        """sparse, the dense form or forms, and gather."""
        layer, w = self.layer, self.w
        settings = dict(stride=layer.stride, padding=layer.padding, groups=layer.groups)
        channels_last = w.to(memory_format=torch.channels_last)

        def sparse(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return conv2d(x, w, None, self.patches, layer.side, **settings)[0]

        def dense(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, w, **settings)

        convolution = Side(dense, (self.dense(self.x), channels_last), self.dense(self.grad), self.rows)
        if layer.linear:
            return self._linear_sides(convolution)
        gather = self._gather_mm() if (layer.kernel, layer.stride) == (1, 1) else self._gather_tiles(settings)
        return {"sparse": Side(sparse, (self.x, w), self.grad), "dense": convolution, "gather": gather}

    def _linear_sides(self, convolution: Side) -> dict[str, Side]:
        w = self.w[:, :, 0, 0].contiguous()

        def sparse(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(sf.SparseTensor(x, self.patches, self.layer.side, channels_last=True), w).features

        inputs = (self.dense(self.x).permute(0, 2, 3, 1), w)
        linear = Side(F.linear, inputs, self.dense(self.grad).permute(0, 2, 3, 1), self._rows_nhwc)
        sides = {"sparse": Side(sparse, (self.x, w), self.grad), "dense convolution": convolution}
        return sides | {"dense linear": linear, "gather": self._gather_mm()}

    def _rows_nhwc(self, map_: torch.Tensor) -> torch.Tensor:
        return self.rows(map_.permute(0, 3, 1, 2))

    def _gather_mm(self) -> Side:
        return Side(lambda x, w: torch.mm(x, w.t()), (self.x, self.w[:, :, 0, 0].contiguous()), self.grad)

    def _gather_tiles(self, settings: dict) -> Side:
        layer = self.layer
        index = tile_index(self.patches, layer.side, layer.kernel, layer.stride, layer.padding)
        valid = dict(stride=layer.stride, groups=layer.groups)

        def gather(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return untile(F.conv2d(tiles(x, index), w, **valid))

        own = {}
        if layer.stride == 1:  # grad-input is the same gather with flipped taps, which avoids a scattered sum
            back = tile_index(self.patches, layer.side, layer.kernel, 1, layer.kernel - 1 - layer.padding)

            def grad_input() -> torch.Tensor:
                flipped = self.w.flip(2, 3)
                flipped = flipped if layer.groups > 1 else flipped.transpose(0, 1)
                return untile(F.conv2d(tiles(self.grad, back), flipped, groups=layer.groups))

            own["grad_input"] = grad_input
        return Side(gather, (self.x, self.w.to(memory_format=torch.channels_last)), self.grad, own=own)

    def work(self, direction: str) -> Work:
        """Products of pairs of active pixels that the window joins; rows and weight read or written once."""
        layer = self.layer
        found = pairs(self.patches.active, layer.side, layer.kernel, layer.stride, layer.padding)
        flops = 2 * found * layer.channels // layer.groups * layer.out
        return Work(flops, 4 * (self.x.numel() + self.grad.numel() + self.w.numel()))

    def terms(self, direction: str) -> int:
        """Products in the longest sum of a direction."""
        layer = self.layer
        if direction == "grad_weight":
            return self.grad.shape[0]
        return layer.kernel**2 * (layer.channels if direction == "forward" else layer.out) // layer.groups

    def info(self) -> dict:
        """What a result says about the layer."""
        layer = self.layer
        return dict(
            net=layer.net, layer=layer.name, kernel=layer.kernel, stride=layer.stride, groups=layer.groups,
            side=layer.side, channels=layer.channels, out_channels=layer.out, batch=BATCH, mask_ratio=layer.mask_ratio,
            rows_in=self.x.shape[0], rows_out=self.grad.shape[0], linear=layer.linear,
        )  # fmt: skip


def pairs(active: torch.Tensor, side: int, kernel: int, stride: int, padding: int) -> int:
    """(active output pixel, active input pixel) pairs of a window on patches `active` (B, gh, gw)."""
    fine = active[:, None].float()
    inputs = F.interpolate(fine, scale_factor=side)
    reached = F.conv2d(inputs, torch.ones(1, 1, kernel, kernel), stride=stride, padding=padding)
    return round(float((reached * F.interpolate(fine, scale_factor=side // stride)).double().sum()))
