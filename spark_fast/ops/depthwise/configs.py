"""Tile sizes that the Triton depthwise convolution may run with; all are compiled and checked for spills by the tests.

BLOCK_R counts runs of PIXELS pixels of a line (`triton.gather_lines`) or rows (`triton.gather_rows`).
"""

from __future__ import annotations

from spark_fast.ops.tuning import Config

LINES: list[Config] = [
    {"BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 4},
    {"BLOCK_R": 8, "BLOCK_C": 128, "num_warps": 4},
    {"BLOCK_R": 32, "BLOCK_C": 32, "num_warps": 4},
    {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 4},
]
ROWS: list[Config] = [
    {"BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 4},
    {"BLOCK_R": 1, "BLOCK_C": 256, "num_warps": 1},
    {"BLOCK_R": 1, "BLOCK_C": 1024, "num_warps": 4},
    {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 4},
]
WEIGHT: list[Config] = [
    {"BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 4},
    {"BLOCK_R": 32, "BLOCK_C": 32, "num_warps": 4},
    {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 4},
]
