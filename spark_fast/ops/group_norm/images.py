"""Where the rows of each image lie: patches are sorted by image, so that they follow one another."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from spark_fast.patches import ActivePatches


def patch_starts(patches: ActivePatches) -> torch.Tensor:
    """int64 (B + 1,) on the patches' device, without a host sync: the patches before each image, and all of them. Made
    once."""
    if "starts" not in patches.derived:
        with torch.inference_mode(False):  # they stay, perhaps for a training step
            patches.derived["starts"] = _starts(patches)
    return patches.derived["starts"]


def _starts(patches: ActivePatches) -> torch.Tensor:
    if patches.per_image is not None:
        return torch.arange(patches.batch + 1, device=patches.device) * patches.per_image
    return F.pad(patches.active.flatten(1).sum(1).cumsum(0), (1, 0))
