from spark_fast.ops.norm.api import batch_norm, batch_norm_dense, layer_norm, sync_batch_norm

__all__ = ["batch_norm", "batch_norm_dense", "layer_norm", "sync_batch_norm"]
