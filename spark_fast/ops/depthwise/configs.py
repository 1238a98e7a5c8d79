"""Tile sizes that the Triton depthwise convolution may run with: docs/triton_report.md compiles all of them.

BLOCK_R counts runs of pixels, or rows where there are no runs. BLOCK_C is less than the number of threads: then each
thread loads the weights that it multiplies by, and none are exchanged through shared memory.
"""

from __future__ import annotations

import torch

from spark_fast.ops.tuning import Config

# Four channels for each thread: with eight, some windows spill registers.
GATHER: list[Config] = [
    {"BLOCK_R": 8, "BLOCK_C": 64, "num_warps": 4},
    {"BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_R": 16, "BLOCK_C": 32, "num_warps": 4},
    {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 4},
]
PRODUCT: list[Config] = [
    {"BLOCK_R": 16, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_R": 32, "BLOCK_C": 16, "num_warps": 4},
]
# With more runs of 16 channels some windows spill in float32.
FLOAT32_PRODUCT: list[Config] = [PRODUCT[0], {"BLOCK_R": 16, "BLOCK_C": 16, "num_warps": 4}]


def product_configs(dtype: torch.dtype) -> list[Config]:
    return FLOAT32_PRODUCT if dtype == torch.float32 else PRODUCT
