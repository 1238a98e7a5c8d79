from spark_fast.ops.pool.api import avg_pool2d, max_pool2d

__all__ = ["avg_pool2d", "max_pool2d"]
