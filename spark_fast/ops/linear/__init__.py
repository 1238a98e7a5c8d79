from spark_fast.ops.linear.api import linear

__all__ = ["linear"]
