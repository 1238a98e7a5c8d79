from spark_fast.ops.depthwise.api import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
