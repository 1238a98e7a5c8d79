from spark_fast.ops.norm.api import batch_norm, layer_norm, sync_batch_norm

__all__ = ["batch_norm", "layer_norm", "sync_batch_norm"]
