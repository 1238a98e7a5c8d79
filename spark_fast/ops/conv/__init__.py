from spark_fast.ops.conv.api import conv2d

__all__ = ["conv2d"]
