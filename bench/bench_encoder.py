"""Encoder forward + backward: sparse against the same network dense, channels-last and masked, in one run.

The two are proven equal first, then run alternately; `extra_info` holds both medians and their ratio, and
pytest-benchmark's own columns time the sparse one once more.
"""

from __future__ import annotations

import statistics

import pytest
import torch

import spark_fast as sf
from spark_fast.evaluate.speed import compare_with_dense

SIZE, MASK_RATIO, ROUNDS = 224, 0.6, 9


@pytest.mark.parametrize("batch", [8])
@pytest.mark.parametrize("model", ["resnet50", "convnext_tiny"])
def test_encoder(benchmark, model: str, batch: int) -> None:
    encoder = sf.Encoder(model)
    images = torch.randn(batch, 3, SIZE, SIZE)
    active = sf.random_patch_mask(batch, (SIZE // 32, SIZE // 32), MASK_RATIO)
    speed = compare_with_dense(encoder, images, active, ROUNDS)

    def step() -> None:
        maps = encoder(sf.SparseTensor.from_dense(images, sf.ActivePatches(active)))
        sum(m.features.square().mean() for m in maps).backward()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(
        model=model,
        batch=batch,
        img_size=SIZE,
        mask_ratio=MASK_RATIO,
        dtype="float32",
        rounds=ROUNDS,
        sparse_ms=round(1000 * statistics.median(speed.sparse), 1),
        dense_ms=round(1000 * statistics.median(speed.dense), 1),
        ratio=round(speed.ratio, 2),
    )
