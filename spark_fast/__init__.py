"""Sparse and hierarchical masked modelling of convolutional networks, with the masked pixels really skipped."""

from spark_fast import nn, ops
from spark_fast.decoder import Decoder
from spark_fast.densify import Densify
from spark_fast.encoder import Encoder
from spark_fast.mask import (
    block_patch_mask,
    grid_patch_mask,
    keep_count,
    mesh_patch_mask,
    random_patch_mask,
    register_mask,
)
from spark_fast.memory import keep_memory
from spark_fast.nn import to_dense, to_sparse
from spark_fast.ops.backend import BackendError, use_backend
from spark_fast.ops.tuning import autotune
from spark_fast.patches import ActivePatches
from spark_fast.rules import SparseOpError, rule
from spark_fast.spark import SparK
from spark_fast.tensor import SparseTensor

__version__ = "0.1.0"

__all__ = [
    "ActivePatches", "BackendError", "Decoder", "Densify", "Encoder", "SparK", "SparseOpError", "SparseTensor",
    "autotune", "block_patch_mask", "grid_patch_mask", "keep_count", "keep_memory", "load_released", "mesh_patch_mask",
    "nn", "ops", "pretrain", "random_patch_mask", "register_mask", "rule", "to_dense", "to_sparse", "use_backend",
]  # fmt: skip


def __getattr__(name: str):
    # Loaded on first use: training needs torchvision, which the ops do not.
    if name == "pretrain":
        from spark_fast.train import pretrain

        return pretrain
    if name == "load_released":
        from spark_fast.released import load_released

        return load_released
    raise AttributeError(f"module 'spark_fast' has no attribute {name!r}")
