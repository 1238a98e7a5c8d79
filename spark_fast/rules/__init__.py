"""Sparse rules: what a PyTorch function does to a SparseTensor.

`apply` looks the function up. Without a rule, an operation that only looks at a pixel's neighbourhood runs on the
dense, zero-filled map and is masked again, which is the exact meaning (one warning per operation); any other operation
raises SparseOpError.

    registry.py     the table, @rule, errors, the warning
    custom.py       which functions besides PyTorch's can have a rule; torch.autograd.Function
    pointwise.py    functions of single pixels; how dense operands are broadcast to the rows
    layers.py       convolution, pooling, norms, linear, padding, interpolation: the ops
    reductions.py   over channels of a pixel, over the active pixels of an image
    norms.py        norms as numbers; group and instance norm
    shapes.py       permute, reshape, cat, split
    indexing.py     x[...] and x[...] = value
    views.py        SparseView: channels of several dimensions
    tokens.py       Tokens: the active pixels of each image as a sequence, for attention over space
    padded.py       PaddedMap: what F.pad gives, for the window op that follows
    dense.py        functions that run on the dense map
"""

from spark_fast.rules import dense, indexing, layers, norms, padded, pointwise, reductions, shapes, tokens, views  # noqa: F401
from spark_fast.rules.apply import apply
from spark_fast.rules.registry import RULES, SparseOpError, named, rule

__all__ = ["RULES", "SparseOpError", "apply", "named", "rule"]
