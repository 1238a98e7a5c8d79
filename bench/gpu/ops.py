"""Section "ops": every op by every backend of ours against the best dense form."""

from __future__ import annotations

import torch

import spark_fast as sf
from bench.gpu import conv_ops, row_ops, warm
from bench.gpu.measure import Peaks, measure_peaks
from bench.gpu.section import Section

RATIO = 0.6
LIMIT = 25.0  # seconds of a case, whose kernel may hang


def patches_of(section: Section) -> sf.ActivePatches:
    """256 images of 7x7 patches, 20 of them active."""
    batch, grid = (2, (2, 2)) if section.tiny else (256, (7, 7))
    active = sf.random_patch_mask(batch, grid, RATIO, torch.Generator().manual_seed(0))
    return sf.ActivePatches(active.to(section.device))


def run(section: Section) -> None:
    device, peaks = torch.device(section.device), []
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        section.case("compiling", lambda: warm.start_all(section, section.left / 3), optional=True)
    patches = patches_of(section)

    def ceilings() -> dict:
        peaks.append(measure_peaks(device, section.tiny))
        return peaks[0].described()

    known = next((case for case in section.cases if case["case"] == "peaks" and "copy_tbs" in case), None)
    if known:  # by an earlier process of this section
        peaks.append(Peaks(*(1e12 * known[k] for k in ("half_tflops", "single_tflops", "copy_tbs"))))
    else:
        section.case("peaks", ceilings)
    measure_all(section, patches, lambda: peaks[0])


def measure_all(section: Section, patches: sf.ActivePatches, peaks) -> None:
    for layer, direction in conv_ops.cases():

        def one(layer=layer, direction=direction) -> dict:
            torch.manual_seed(0)
            return conv_ops.measure(conv_ops.Problem(layer, patches, section.tiny), direction, peaks())

        section.case(conv_ops.name_of(layer, direction), one, limit=LIMIT)
    for spec in row_ops.specs(patches, section.tiny):
        for direction in spec.directions:

            def two(spec=spec, direction=direction) -> dict:
                torch.manual_seed(0)
                return row_ops.measure(spec.make(), direction, peaks())

            section.case(f"{spec.name} {direction}", two, limit=LIMIT)
