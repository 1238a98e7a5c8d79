"""How the Triton MLP may make the hidden rows, and with which tiles; all are compiled for docs/triton_report.md.

A configuration with BLOCK_K is a matrix product of ours that ends in the GELU; one without, PyTorch's product and then
a pass over tiles.
"""

from __future__ import annotations

import torch

from spark_fast.ops.tuning import Config

PASSES: list[Config] = [
    {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 8},
    {"BLOCK_R": 32, "BLOCK_C": 128, "num_warps": 8},
]
FORWARD: list[Config] = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
]
# With 64 sums of a thread in place of 32 the derivative spills.
BACKWARD: list[Config] = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
]
# float32 outside TF32 runs on the CUDA cores, element by element from registers.
SMALL: Config = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}


def choices(products: list[Config], dtype: torch.dtype, precision: str) -> list[Config]:
    """PASSES, the first of which is used where nothing is measured, and those of FORWARD or BACKWARD that fit."""
    if dtype == torch.float32:  # elements twice as wide
        wide = [{**config, "BLOCK_K": config["BLOCK_K"] // 2} for config in products]
        products = [SMALL] if precision == "ieee" else wide
    return [*PASSES, *products]
