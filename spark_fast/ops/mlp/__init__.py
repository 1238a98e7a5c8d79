from spark_fast.ops.mlp.api import mlp

__all__ = ["mlp"]
