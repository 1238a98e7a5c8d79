"""How the gain depends on the mask ratio, and that the cost follows the number of active pixels."""

from __future__ import annotations

import pytest

from bench.bench_encoder import measure_encoder
from bench.harness import Work, run_case
from bench.layers import Layer, Problem
from bench.settings import MASK_RATIO, SIZE, SWEEP_ROUNDS, TINY

RATIOS = (0.0, 0.4, 0.6, 0.75, 0.9)
SWEEP_BATCH = 1 if TINY else 4


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("model", ["resnet50", "convnext_small"])
def test_encoder_mask_ratio(benchmark, ceilings, model: str, ratio: float) -> None:
    measure_encoder(
        benchmark, ceilings, model, SWEEP_BATCH, SIZE, ratio, SWEEP_ROUNDS, kind="sweep", sweep="mask ratio"
    )  # fmt: skip


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("side", "channels"), [(8, 64), (4, 128), (2, 256), (1, 512)])
def test_layer_mask_ratio(benchmark, ceilings, side: int, channels: int, ratio: float) -> None:
    """A 3x3 convolution, all three directions together."""
    problem = Problem(Layer("resnet", side, channels, channels, mask_ratio=ratio))
    sides = {name: s for name, s in problem.sides().items() if name != "gather"}
    work, terms = problem.work("forward"), max(problem.terms(d) for d in ("forward", "grad_weight"))
    run_case(
        benchmark, ceilings, "all", sides, Work(3 * work.flops, 3 * work.bytes), terms,
        kind="sweep", sweep="layer mask ratio", **problem.info(),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2] if TINY else [2, 4, 8, 16])
def test_batch_size(benchmark, ceilings, batch: int) -> None:
    measure_encoder(
        benchmark, ceilings, "resnet50", batch, SIZE, MASK_RATIO, SWEEP_ROUNDS, kind="sweep", sweep="batch"
    )  # fmt: skip


@pytest.mark.parametrize("size", [64, 128] if TINY else [128, 224, 320])
def test_resolution(benchmark, ceilings, size: int) -> None:
    measure_encoder(
        benchmark, ceilings, "resnet50", SWEEP_BATCH, size, MASK_RATIO, SWEEP_ROUNDS, kind="sweep", sweep="resolution"
    )  # fmt: skip
