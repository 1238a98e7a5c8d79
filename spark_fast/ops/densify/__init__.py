from spark_fast.ops.densify.api import gather_patches, scatter_patches

__all__ = ["gather_patches", "scatter_patches"]
