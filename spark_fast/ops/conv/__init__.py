from spark_fast.ops.conv.api import conv2d
from spark_fast.ops.conv.dense import dense_conv2d, project
from spark_fast.ops.conv.up import up_conv2d

__all__ = ["conv2d", "dense_conv2d", "project", "up_conv2d"]
