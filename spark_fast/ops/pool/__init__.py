from spark_fast.ops.pool.api import avg_pool, avg_pool2d, max_pool, max_pool2d, pool_window

__all__ = ["avg_pool", "avg_pool2d", "max_pool", "max_pool2d", "pool_window"]
