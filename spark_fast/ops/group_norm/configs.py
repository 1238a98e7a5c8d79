"""Tile sizes that the Triton group norm may run with; all are compiled for docs/triton_report.md and checked for
spills."""

from __future__ import annotations

from spark_fast.ops.tuning import Config

# TILE: elements of a tile, BLOCK_C: its channels, unless an image has too few rows to fill the rest.
TILES: list[Config] = [
    {"TILE": 4096, "BLOCK_C": 64, "num_warps": 8},
    {"TILE": 2048, "BLOCK_C": 64, "num_warps": 4},
    {"TILE": 4096, "BLOCK_C": 256, "num_warps": 8},
]
