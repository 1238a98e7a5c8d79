"""Layers that are the dense PyTorch layer on a tensor and the sparse one on a SparseTensor."""

from spark_fast.nn import functional
from spark_fast.nn.convert import to_dense, to_sparse
from spark_fast.nn.modules import (
    SparseAvgPool2d,
    SparseBatchNorm2d,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseLayerNorm,
    SparseMaxPool2d,
    SparseSyncBatchNorm,
)

__all__ = [
    "SparseAvgPool2d",
    "SparseBatchNorm2d",
    "SparseConv2d",
    "SparseConvTranspose2d",
    "SparseLayerNorm",
    "SparseMaxPool2d",
    "SparseSyncBatchNorm",
    "functional",
    "to_dense",
    "to_sparse",
]
