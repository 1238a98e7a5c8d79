"""How the Triton patch loss may run; all are compiled for docs/triton_report.md and checked for spills."""

from __future__ import annotations

from spark_fast.ops.tuning import Config

# BLOCK: values of a patch that are held at once, at most.
PATCH: list[Config] = [
    {"BLOCK": 4096, "num_warps": 8},
    {"BLOCK": 4096, "num_warps": 4},
    {"BLOCK": 2048, "num_warps": 4},
]
