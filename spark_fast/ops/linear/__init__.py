from spark_fast.ops.linear.api import checked_linear, linear

__all__ = ["checked_linear", "linear"]
