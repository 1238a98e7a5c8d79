"""The sparse layers: subclasses of the dense ones with the same arguments, parameters and state-dict keys.

Most inherit the dense layer's forward, which reaches the sparse op through SparseTensor's `__torch_function__`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from spark_fast.nn import functional
from spark_fast.ops.norm import batch_norm, layer_norm, sync_batch_norm
from spark_fast.ops.output_sets import check_output
from spark_fast.patches import ActivePatches
from spark_fast.tensor import SparseTensor


class _ToOutput:
    """The choice of an output's active pixels, `output`: "mask" or "dilated" (`spark_fast.nn.functional`). It is an
    attribute, no part of the state dict, and stays when `to_dense` and `to_sparse` swap the class."""

    output = "mask"

    def __init__(self, *args, output: str = "mask", **kwargs):
        super().__init__(*args, **kwargs)
        check_output(type(self).__name__, output)
        self.output = output

    def _dilates(self, input: torch.Tensor | SparseTensor) -> bool:
        if self.output != "mask" and isinstance(input, torch.fx.Proxy):
            raise TypeError(
                f"{type(self).__name__}: torch.fx would trace output={self.output!r} as the dense layer. Trace the "
                "dense model, then call to_sparse on the trace"
            )
        return isinstance(input, SparseTensor) and self.output != "mask"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.output == "mask" else f", output={self.output!r}")


class SparseConv2d(_ToOutput, nn.Conv2d):
    """nn.Conv2d; on a SparseTensor, convolution of the active pixels (`spark_fast.nn.functional.conv2d`).

    Args:
        output: "mask": the active set does not grow (submanifold); "dilated": every pixel whose window holds an active
            one. A tensor that is not sparse does not ask. All other arguments are nn.Conv2d's.

    A `padding_mode` other than "zeros" pads the dense, zero-filled map, with one warning.

    Raises:
        ValueError: `padding_mode` is not "zeros" and `output` is "dilated".
    """

    def forward(self, input: torch.Tensor | SparseTensor) -> torch.Tensor | SparseTensor:
        if not self._dilates(input):
            return super().forward(input)
        if self.padding_mode != "zeros":
            raise ValueError(f"SparseConv2d: output='dilated' needs padding_mode='zeros'; got {self.padding_mode!r}")
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return functional.conv2d(input, self.weight, self.bias, *settings, self.output)


class SparseConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d; on a SparseTensor, the transposed convolution of the active pixels
    (`spark_fast.nn.functional.conv_transpose2d`)."""

    def forward(
        self,
        input: torch.Tensor | SparseTensor,
        output_size: list[int] | None = None,
        output: SparseTensor | ActivePatches | None = None,
    ) -> torch.Tensor | SparseTensor:
        """
        Args:
            output_size: as in nn.ConvTranspose2d.
            output: of a sparse input, where the result lies: the finer SparseTensor that a strided convolution made
                `input` from, or patches of one pixel each. By default the input's patches.

        Raises:
            TypeError, ValueError: `output` with a dense input or with an `output_size`, or what
                `functional.conv_transpose2d` raises.
        """
        if output is None:
            return super().forward(input, output_size)
        if not isinstance(input, SparseTensor):
            raise TypeError(f"SparseConvTranspose2d: output needs a sparse input; got {type(input).__name__}")
        if output_size is not None:
            raise ValueError("SparseConvTranspose2d: give output or output_size, not both: output has a size")
        settings = (self.stride, self.padding, 0, self.groups, self.dilation)
        return functional.conv_transpose2d(input, self.weight, self.bias, *settings, output)


class SparseMaxPool2d(_ToOutput, nn.MaxPool2d):
    """nn.MaxPool2d; on a SparseTensor, inactive neighbours count as 0 (`spark_fast.nn.functional.max_pool2d`). `output`
    as in SparseConv2d."""

    def forward(self, input: torch.Tensor | SparseTensor) -> torch.Tensor | SparseTensor:
        if not self._dilates(input):
            return super().forward(input)
        if self.return_indices:
            raise ValueError("SparseMaxPool2d: return_indices=True has no meaning on packed rows")
        settings = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return functional.max_pool2d(input, *settings, self.output)


class SparseAvgPool2d(_ToOutput, nn.AvgPool2d):
    """nn.AvgPool2d; on a SparseTensor, inactive neighbours count as 0 (`spark_fast.nn.functional.avg_pool2d`). `output`
    as in SparseConv2d."""

    def forward(self, input: torch.Tensor | SparseTensor) -> torch.Tensor | SparseTensor:
        if not self._dilates(input):
            return super().forward(input)
        settings = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return functional.avg_pool2d(input, *settings, self.divisor_override, self.output)


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
