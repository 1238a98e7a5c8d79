from spark_fast.ops.norm.api import (
    batch_apply,
    batch_norm,
    batch_norm_dense,
    batch_statistics,
    layer_norm,
    layer_scale,
    sync_batch_norm,
)
from spark_fast.ops.norm.scatter import batch_norm_scatter, layer_norm_scatter

__all__ = [
    "batch_apply", "batch_norm", "batch_norm_dense", "batch_norm_scatter", "batch_statistics", "layer_norm",
    "layer_norm_scatter", "layer_scale", "sync_batch_norm",
]  # fmt: skip
