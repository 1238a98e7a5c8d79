"""Tile sizes that the Triton convolution may run with: docs/triton_report.md compiles all and looks for spills."""

from __future__ import annotations

import torch

from spark_fast.ops.tuning import Config

GATHER: list[Config] = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5},
    {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
]
OUTER: list[Config] = [
    {"BLOCK_C": 64, "BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_C": 64, "BLOCK_N": 128, "BLOCK_R": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_C": 128, "BLOCK_N": 128, "BLOCK_R": 32, "num_warps": 8, "num_stages": 4},
    {"BLOCK_C": 32, "BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_C": 16, "BLOCK_N": 16, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3},
]
# With taps and channels as one depth every element has an address of its own, which takes registers.
UNFOLDED_GATHER: list[Config] = [
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
]
UNFOLDED_OUTER: list[Config] = [
    {"BLOCK_C": 32, "BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_C": 64, "BLOCK_N": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 4},
    {"BLOCK_C": 32, "BLOCK_N": 16, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3},
]
# float32 outside TF32 runs on the CUDA cores, element by element from registers. With two stages 2x2/2 spills.
SMALL_GATHER: Config = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
SMALL_OUTER: Config = {"BLOCK_C": 32, "BLOCK_N": 32, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2}


def gather_configs(dtype: torch.dtype, precision: str, unfold: bool = False) -> list[Config]:
    return _fitting(UNFOLDED_GATHER if unfold else GATHER, SMALL_GATHER, dtype, precision, "BLOCK_K")


def outer_configs(dtype: torch.dtype, precision: str, unfold: bool = False) -> list[Config]:
    choices = UNFOLDED_OUTER if unfold else OUTER
    if unfold and dtype == torch.float32:
        choices = [config for config in choices if config["BLOCK_C"] <= 32]  # of 64 channels: spills
    return _fitting(choices, SMALL_OUTER, dtype, precision, "BLOCK_R")


def _fitting(configs: list[Config], small: Config, dtype: torch.dtype, precision: str, depth: str) -> list[Config]:
    if dtype != torch.float32:
        return configs
    if precision == "ieee":
        return [small]
    return [{**config, depth: config[depth] // 2} for config in configs]  # elements twice as wide
