from spark_fast.ops.conv.api import conv2d, convolve
from spark_fast.ops.conv.dense import dense_conv2d, project
from spark_fast.ops.conv.transposed import conv_transpose2d, convolve_transposed
from spark_fast.ops.conv.up import up_conv2d

__all__ = [
    "conv2d", "conv_transpose2d", "convolve", "convolve_transposed", "dense_conv2d", "project", "up_conv2d",
]  # fmt: skip
