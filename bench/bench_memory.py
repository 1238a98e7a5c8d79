"""Peak memory of an encoder's forward + backward, sparse against dense; see `bench.memory` for what is counted.

pytest-benchmark's columns time the whole process of the sparse side, which says nothing.
"""

from __future__ import annotations

import pytest

import spark_fast as sf
from bench import memory
from bench.harness import significant
from bench.nets import dense_forms, model_kwargs
from bench.settings import MASK_RATIO, SIZE, TINY

BATCH = 1 if TINY else 16


@pytest.mark.parametrize("model", ["resnet50"] if TINY else ["resnet50", "convnext_small"])
def test_memory(benchmark, model: str) -> None:
    if reason := memory.missing():
        pytest.skip(reason)
    forms = dense_forms(sf.Encoder(model, model_kwargs=model_kwargs(model)))
    dense = {form: memory.in_own_process(form, model, BATCH) for form in forms}
    sparse = benchmark.pedantic(memory.in_own_process, args=("sparse", model, BATCH), rounds=1)
    best = min(dense, key=dense.get)
    mib = {"sparse": significant(sparse), "dense": significant(dense[best])}
    benchmark.extra_info.update(
        kind="memory", net=model, batch=BATCH, img_size=SIZE, mask_ratio=MASK_RATIO, dtype="float32", mib=mib,
        share=round(mib["sparse"] / mib["dense"], 3) if mib["dense"] else None, dense_form=best,
    )  # fmt: skip
