"""Tile sizes that the Triton copies may run with; all are compiled for docs/triton_report.md and checked for spills."""

from __future__ import annotations

from spark_fast.ops.tuning import Config

# TILE: elements of a tile, BLOCK_C: its channels at most.
COPY: list[Config] = [
    {"TILE": 2048, "BLOCK_C": 128, "num_warps": 4},
    {"TILE": 4096, "BLOCK_C": 256, "num_warps": 8},
    {"TILE": 1024, "BLOCK_C": 64, "num_warps": 2},
]
