"""What the package wants to reach at mask ratio 0.6, 224 px and float32 on a CPU; a table says whether it does."""

from __future__ import annotations

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
