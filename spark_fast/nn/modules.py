"""The sparse layers: subclasses of the dense ones with the same arguments, parameters and state-dict keys.

Most inherit the dense layer's forward, which reaches the sparse op through SparseTensor's `__torch_function__`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from spark_fast.ops.norm import batch_norm, layer_norm, sync_batch_norm
from spark_fast.tensor import SparseTensor


class SparseConv2d(nn.Conv2d):
    """nn.Conv2d; on a SparseTensor, submanifold convolution of the active pixels (`spark_fast.ops.conv.conv2d`).

    Raises:
        ValueError: `padding_mode` is not "zeros" and the input is sparse: masked pixels have no values to reflect.
    """

    def forward(self, input: torch.Tensor | SparseTensor) -> torch.Tensor | SparseTensor:
        if isinstance(input, SparseTensor) and self.padding_mode != "zeros":
            raise ValueError(f"SparseConv2d: padding_mode must be 'zeros' on a SparseTensor; got {self.padding_mode!r}")
        return super().forward(input)


class SparseMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d; on a SparseTensor, inactive neighbours count as 0 (`spark_fast.ops.pool.max_pool2d`)."""


class SparseAvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d; on a SparseTensor, inactive neighbours count as 0 (`spark_fast.ops.pool.avg_pool2d`)."""


class SparseBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d; on a SparseTensor, statistics over the active pixels (`spark_fast.ops.norm.batch_norm`)."""


class SparseSyncBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm; on a SparseTensor, statistics over the active pixels of all ranks, on any device.

    In evaluation, without an initialised process group or in a group of one it is `SparseBatchNorm2d`.
    """

    def forward(self, input: torch.Tensor | SparseTensor) -> torch.Tensor | SparseTensor:
        if not isinstance(input, SparseTensor):
            return super().forward(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        use_batch = self.training or self.running_mean is None
        update = self.training and self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if update or not use_batch else (None, None)
        group = self.process_group
        if self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            rows = sync_batch_norm(input.features, mean, var, self.weight, self.bias, momentum, self.eps, group)
        else:
            rows = batch_norm(input.features, mean, var, self.weight, self.bias, use_batch, momentum, self.eps)
        return input.with_features(rows)


class SparseLayerNorm(nn.LayerNorm):
    """nn.LayerNorm; on a SparseTensor, over the channels of each active pixel, whatever the order of dimensions.

    Raises:
        ValueError: the input is sparse and `normalized_shape` is not its number of channels.
    """

    def forward(self, input: torch.Tensor | SparseTensor) -> torch.Tensor | SparseTensor:
        if not isinstance(input, SparseTensor):
            return super().forward(input)
        if self.normalized_shape != (input.features.shape[1],):
            raise ValueError(
                f"SparseLayerNorm: normalized_shape {self.normalized_shape} must be the {input.features.shape[1]} "
                "channels of the SparseTensor"
            )
        return input.with_features(layer_norm(input.features, self.weight, self.bias, self.eps))
