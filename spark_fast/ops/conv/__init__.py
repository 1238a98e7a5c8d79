from spark_fast.ops.conv.api import conv2d
from spark_fast.ops.conv.dense import dense_conv2d, project

__all__ = ["conv2d", "dense_conv2d", "project"]
