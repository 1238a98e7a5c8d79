"""How fast a sparse encoder is against the same network run dense, on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from spark_fast.encoder import Encoder
from spark_fast.patches import ActivePatches
from spark_fast.tensor import SparseTensor

SPATIAL = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Speed:
    """Seconds of forward + backward of each round, after warm-up; the two were run alternately."""

    sparse: list[float]
    dense: list[float]

    @property
    def ratio(self) -> float:
        """Median of dense over median of sparse."""
        return statistics.median(self.dense) / statistics.median(self.sparse)


class MaskedDense(nn.Module):
    """The encoder's network run dense, channels-last, with as few masks as keep hidden pixels from leaking in.

    The input of every layer that looks at neighbours is multiplied by the mask, and so are the feature maps; what is in
    between computes hidden pixels in vain. Batch statistics cover the whole map, which only training mode shows. The
    released code masks more often, and gathers the active pixels for each norm.
    """

    def __init__(self, encoder: Encoder, active: torch.Tensor):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
        self.active = active[:, None].to(next(encoder.parameters()).dtype)  # (B, 1, gh, gw)
        self.masks: dict[torch.Size, torch.Tensor] = {}
        for module in self.encoder.modules():
            if isinstance(module, SPATIAL) and module.kernel_size not in (1, (1, 1)):
                module.register_forward_pre_hook(lambda module, inputs: (self.mask(inputs[0]), *inputs[1:]))

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[2:]
        if size not in self.masks:
            self.masks[size] = nn.functional.interpolate(self.active, size=size)
        return x * self.masks[size]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.encoder.feature_maps(images)
        return [self.mask(m) for m in maps]


def compare_with_dense(encoder: Encoder, images: torch.Tensor, active: torch.Tensor, rounds: int = 7) -> Speed:
    """Times the encoder's forward + backward against `MaskedDense` in training mode, after proving them equal.

    Args:
        encoder: the encoder; it is left as it was, but for its gradients.
        images: (B, C, H, W) on the encoder's device.
        active: bool (B, gh, gw), the same number of patches in each image.
        rounds: timed rounds, after two for warm-up.

    Raises:
        RuntimeError: the feature maps differ by more than rounding, so that a time would mean nothing.
    """
    encoder = copy.deepcopy(encoder)
    dense = MaskedDense(encoder, active)
    per_image = ActivePatches(active).per_image
    channels_last = images.contiguous(memory_format=torch.channels_last)
    _prove_equal(encoder, dense, images, active)

    def run_sparse() -> None:
        patches = ActivePatches(active, per_image)
        maps = encoder(SparseTensor.from_dense(images, patches))
        sum(m.features.square().mean() for m in maps).backward()

    def run_dense() -> None:
        sum(m.square().mean() for m in dense(channels_last)).backward()

    encoder.train()
    dense.train()
    times = Speed([], [])
    for i in range(rounds + 2):
        for run, series in ((run_sparse, times.sparse), (run_dense, times.dense)):
            seconds = _timed(run, images.device)
            if i >= 2:
                series.append(seconds)
    return times


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def _prove_equal(encoder: Encoder, dense: MaskedDense, images: torch.Tensor, active: torch.Tensor) -> None:
    encoder.eval()
    dense.eval()
    sparse = encoder(SparseTensor.from_dense(images, ActivePatches(active)))
    for ours, theirs in zip(sparse, dense(images), strict=True):
        distance = (ours.to_dense() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        if not distance < 1e-3:
            raise RuntimeError(f"sparse and dense feature maps differ by {distance:.2g} of the largest value")
