"""Tile sizes that the Triton max pooling may run with: docs/triton_report.md compiles all and looks for spills.

BLOCK_R counts runs of pixels, or rows where there are no runs. A thread has four channels of a run: with eight some
windows spill registers.
"""

from __future__ import annotations

from spark_fast.ops.tuning import Config

TILES: list[Config] = [
    {"BLOCK_R": 8, "BLOCK_C": 64, "num_warps": 4},
    {"BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_R": 16, "BLOCK_C": 32, "num_warps": 4},
    {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 4},
]
