from spark_fast.ops.patch_loss.api import normalize_patches, patch_loss

__all__ = ["normalize_patches", "patch_loss"]
