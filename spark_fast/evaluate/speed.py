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

# How far results may be apart, as a share of a tensor's largest value: in float64; and, as they are timed, the maps by
# the rounding of a whole network, and the gradients, which jump where rounding moves an input across a ReLU's kink. A
# tap left out would be farther.
EXACT, ROUNDED, NEAR = 1e-8, 1e-4, 2e-2
PROVEN = 2  # images of the proof, which float64 makes slow
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
    forms = forms or {"as given": encoder}
    prove_equal(encoder, forms, images, active)
    dense = {name: MaskedDense(form, active) for name, form in forms.items()}
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
    encoder: Encoder, forms: Mapping[str, Encoder], images: torch.Tensor, active: torch.Tensor
) -> dict[str, float]:
    """Compares feature maps and parameters' gradients of a few images, in float64 and as they are, in evaluation mode,
    where dense batch norms mean the same.

    Returns:
        the largest distance of "exact maps", "exact gradients", "maps" and "gradients", as shares of each tensor's
        largest value.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    images, active = images[:PROVEN], active[:PROVEN]
    doubles = {name: copy.deepcopy(form).double() for name, form in forms.items()}
    exact = _distances(copy.deepcopy(encoder).double(), doubles, images.double(), active)
    found = {f"exact {name}": gap for name, gap in exact.items()} | _distances(encoder, forms, images, active)
    bounds = {"exact maps": EXACT, "exact gradients": EXACT, "maps": ROUNDED, "gradients": NEAR}
    for name, gap in found.items():
        if not gap < bounds[name]:  # NaN is wrong too
            raise RuntimeError(
                f"sparse and dense {name} differ by {gap:.2g} of the largest value, more than rounding "
                f"({bounds[name]}); a time would mean nothing"
            )
    return found


def _distances(
    encoder: Encoder, forms: Mapping[str, Encoder], images: torch.Tensor, active: torch.Tensor
) -> dict[str, float]:
    encoder.eval()
    maps = encoder(SparseTensor.from_dense(images, ActivePatches(active)))
    ours = _gradients(encoder, [m.features for m in maps])
    found: dict[str, list[float]] = {"maps": [], "gradients": []}
    for form in forms.values():
        model = MaskedDense(form, active).eval()
        truth = model(images.contiguous(memory_format=torch.channels_last))
        gradients = _gradients(model.encoder, truth)
        found["maps"] += [distance(m.to_dense(), t) for m, t in zip(maps, truth, strict=True)]
        found["gradients"] += [distance(g.view_as(t), t) for g, t in zip(ours, gradients, strict=True)]
    worst = {}
    for name, distances in found.items():
        worst[name] = max(distances) if all(d == d for d in distances) else float("nan")
    return worst


def _gradients(model: nn.Module, maps: list[torch.Tensor]) -> list[torch.Tensor]:
    # Scaled so that each map weighs the same however large it is: both sides divide by the same sums, up to rounding.
    loss = sum(m.square().sum() / m.detach().square().sum().clamp(min=1e-30) for m in maps)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference as a share of the largest true value; NaN where one of them is not finite."""
    return float((ours - truth).detach().abs().max() / truth.detach().abs().max().clamp(min=1e-30))
