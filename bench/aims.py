"""What the package wants to reach at mask ratio 0.6 and 224 px: in float32 on a CPU, in bfloat16 with 256 images on a
GPU. A table says whether it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ENCODER = {"resnet50": 2.4, "convnext_small": 2.4}
STEP = {"resnet50": 1.6, "convnext_small": 1.7}
UNMASKED = 0.85  # of dense, at mask ratio 0
MEMORY = 0.5  # of dense, at most
SPCONV = 1.5


def of_layer(info: dict) -> float | None:
    """Gain over dense of a convolution, its three directions together."""
    if info["groups"] > 1:
        return 2.4 if info["kernel"] == 7 else None
    if info["stride"] > 1:
        return None
    if info["kernel"] == 3:
        return 3.5 if info["side"] == 1 else 2.2
    return 2.3 if info["kernel"] == 1 else None


@dataclass(frozen=True)
class GpuAim:
    """For one case of `bench.gpu_check`: the gain over `against`, or, with `at_most`, the share of it."""

    section: str
    case: str
    value: float
    against: str = "dense"
    at_most: bool = False

    @property
    def words(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}x"

    def reached(self, case: dict) -> float | None:
        return case.get("shares" if self.at_most else "gains", {}).get(self.against)

    def met(self, case: dict) -> bool | None:
        """None: not measured."""
        value = self.reached(case)
        if value is None:
            return None
        return value <= self.value if self.at_most else value >= self.value


def gpu() -> Iterator[GpuAim]:
    directions = ("forward", "grad_input", "grad_weight")
    layers = {
        f"3x3-side{side}-{c}-{c}": aim for side, c, aim in ((8, 64, 2.2), (4, 128, 2.2), (2, 256, 2.5), (1, 512, 3))
    }
    depthwise = [f"depthwise 7x7-side{side}-{c}-{c}" for side, c in ((8, 128), (4, 256), (2, 512), (1, 1024))]
    for layer, aim in (layers | dict.fromkeys(depthwise, 5)).items():
        yield from (GpuAim("ops", f"{layer} {direction}", aim) for direction in directions)
    for model, encoder, step in (("resnet50", 2.3, 1.6), ("convnext_base", 3, 2)):
        yield GpuAim("nets", f"{model} encoder", encoder)
        yield GpuAim("nets", f"{model} encoder memory", 0.45, at_most=True)
        yield GpuAim("step", f"{model} step", step)
        yield GpuAim("step", f"{model} step, released form", 5, "released")
    for layer in layers:
        yield GpuAim("peers", layer, 1.3, "peer")
