from spark_fast.ops.group_norm.api import group_norm

__all__ = ["group_norm"]
