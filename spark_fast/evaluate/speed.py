"""How fast a sparse encoder is against the same network run dense, on this machine."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from spark_fast.encoder import Encoder
from spark_fast.patches import ActivePatches
from spark_fast.tensor import SparseTensor

BOUND = 1e-4  # of float32 rounding through a whole network, as a share of the largest value
SPATIAL = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Speed:
    """Seconds of each round, after warm-up; the two were run alternately.

    Attributes:
        form: the dense form that was timed; `forms`: each form's seconds in the choice of the fastest.
    """

    sparse: list[float]
    dense: list[float]
    form: str = "as given"
    forms: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of dense over median of sparse."""
        return statistics.median(self.dense) / statistics.median(self.sparse)


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each run in each of `rounds` rounds after `warmup`; the runs take turns, every other round backwards.

    Python's garbage collector waits until the end, so that it does not stop one side for the other's garbage.
    """
    device, times = torch.device(device), {name: [] for name in runs}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + rounds):
            for name in list(runs) if i % 2 == 0 else reversed(list(runs)):
                seconds = _timed(runs[name], device)
                if i >= warmup:
                    times[name].append(seconds)
    finally:
        if enabled:
            gc.enable()
    return times


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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
        self.share = self.active.mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
        self.masks: dict[torch.Size, torch.Tensor] = {}
        for module in self.encoder.modules():
            excites = type(module).__name__ == "SqueezeExcite"
            if excites or (isinstance(module, SPATIAL) and module.kernel_size not in (1, (1, 1))):
                module.register_forward_pre_hook(lambda module, inputs: (self.mask(inputs[0]), *inputs[1:]))
            if excites:  # its mean is over the active pixels
                module.conv_reduce.register_forward_pre_hook(lambda module, inputs: (inputs[0] / self.share,))

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[2:]
        if size not in self.masks:
            self.masks[size] = nn.functional.interpolate(self.active, size=size)
        return x * self.masks[size]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.encoder.feature_maps(images)
        return [self.mask(m) for m in maps]


def compare_with_dense(
    encoder: Encoder,
    images: torch.Tensor,
    active: torch.Tensor,
    rounds: int = 7,
    forms: Mapping[str, Encoder] | None = None,
) -> Speed:
    """Times the encoder's forward + backward against `MaskedDense` in training mode, after proving them equal.

    Args:
        encoder: the encoder; it is left as it was, but for its gradients.
        images: (B, C, H, W) on the encoder's device.
        active: bool (B, gh, gw), the same number of patches in each image.
        rounds: timed rounds, after one for warm-up and the proof.
        forms: ways to write the same network dense, with the same weights, by name; default: the encoder's own. Each is
            proven, and the fastest is the one compared with.

    Raises:
        RuntimeError: feature maps or gradients differ by more than rounding, so that a time would mean nothing.
    """
    encoder = copy.deepcopy(encoder)
    dense = {name: MaskedDense(form, active) for name, form in (forms or {"as given": encoder}).items()}
    prove_equal(encoder, dense, images, active)
    per_image = ActivePatches(active).per_image
    channels_last = images.contiguous(memory_format=torch.channels_last)

    def run_sparse() -> None:
        patches = ActivePatches(active, per_image)
        maps = encoder(SparseTensor.from_dense(images, patches))
        sum(m.features.square().mean() for m in maps).backward()

    def run_dense(form: str) -> None:
        sum(m.square().mean() for m in dense[form](channels_last)).backward()

    encoder.train()
    for model in dense.values():
        model.train()
    runs = {name: lambda name=name: run_dense(name) for name in dense}
    best, seconds = fastest(runs, images.device)
    times = alternate({"sparse": run_sparse, "dense": runs[best]}, rounds, 1, images.device)
    return Speed(times["sparse"], times["dense"], best, seconds)


def fastest(
    runs: Mapping[str, Callable[[], object]], device: torch.device | str = "cpu", rounds: int = 1
) -> tuple[str, dict[str, float]]:
    """The name of the fastest run, and each one's median seconds; where there is no choice nothing is timed."""
    if len(runs) == 1:
        return next(iter(runs)), {}
    times = alternate(runs, rounds, 1, device)
    medians = {name: statistics.median(series) for name, series in times.items()}
    return min(medians, key=medians.get), medians


def prove_equal(
    encoder: Encoder, dense: Mapping[str, MaskedDense], images: torch.Tensor, active: torch.Tensor
) -> dict[str, float]:
    """Compares feature maps and parameters' gradients in evaluation mode, where dense batch norms mean the same.

    Returns:
        the largest distance of "maps" and of "gradients", as shares of the largest value of each tensor.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    encoder.eval()
    maps = encoder(SparseTensor.from_dense(images, ActivePatches(active)))
    ours = _gradients(encoder, [m.features for m in maps])
    found: dict[str, list[float]] = {"maps": [], "gradients": []}
    for model in dense.values():
        model.eval()
        truth = model(images.contiguous(memory_format=torch.channels_last))
        gradients = _gradients(model.encoder, truth)
        found["maps"] += [distance(m.to_dense(), t) for m, t in zip(maps, truth, strict=True)]
        found["gradients"] += [distance(g.view_as(t), t) for g, t in zip(ours, gradients, strict=True)]
    for name, distances in found.items():
        wrong = [d for d in distances if not d < BOUND]  # NaN is wrong too
        if wrong:
            raise RuntimeError(
                f"sparse and dense {name} differ by {wrong[0]:.2g} of the largest value, more than rounding ({BOUND}); "
                "a time would mean nothing"
            )
    return {name: max(distances) for name, distances in found.items()}


def _gradients(model: nn.Module, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    # Scaled so that each map weighs the same however large it is: both sides divide by the same sums, up to rounding.
    loss = sum(m.square().sum() / m.detach().square().sum().clamp(min=1e-30) for m in maps)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference as a share of the largest true value; NaN where one of them is not finite."""
    return float((ours - truth).detach().abs().max() / truth.detach().abs().max().clamp(min=1e-30))
