"""Tile sizes that the Triton norms may run with; all are compiled for docs/triton_report.md and checked for spills."""

from __future__ import annotations

from spark_fast.ops.tuning import Config

# TILE: elements of a tile, BLOCK_C: its channels at most.
BATCH: list[Config] = [
    {"TILE": 4096, "BLOCK_C": 64, "num_warps": 8},
    {"TILE": 2048, "BLOCK_C": 64, "num_warps": 4},
    {"TILE": 4096, "BLOCK_C": 256, "num_warps": 8},
]
# A tile of whole rows: TILE elements or one row, of which a warp holds 512 elements at most.
LAYER: list[Config] = [{"TILE": 2048, "num_warps": 4}, {"TILE": 4096, "num_warps": 8}, {"TILE": 1024, "num_warps": 2}]
