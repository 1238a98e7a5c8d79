"""The part of a training step that a CUDA graph can hold, recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

WARM_UP = 3  # runs before the recording, in which libraries choose their kernels and tables are made


class RecordedGradients:
    """`compute(images)`, which fills the parameters' gradients, as a CUDA graph that is launched as one piece.

    Results are those of the calls that it stands for: masks and drop path are drawn from the default generator as it is
    seeded before each replay, and what the warm-up changed is put back. The gradients lie in the graph's own memory and
    are written anew by each replay, so that they must not be set to None in between. Nothing that `compute` does in
    Python is done again, and no number that it read from Python changes.

    Args:
        compute: takes images (B, C, H, W) and returns a tensor; it must not wait for the GPU.
        model: whose parameters get the gradients.
        changed: tensors besides the model's buffers that `compute` changes in place.
        images: an example on the GPU; later ones have its shape and dtype.

    Raises:
        RuntimeError: the step cannot be recorded.
    """

    def __init__(
        self,
        compute: Callable[[torch.Tensor], torch.Tensor],
        model: nn.Module,
        changed: Sequence[torch.Tensor],
        images: torch.Tensor,
    ):
        self.images = images.clone(memory_format=torch.contiguous_format)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(images.device)
        with torch.cuda.device(images.device):
            self._warm_up(compute, model, [*model.buffers(), *changed], stream)
            model.zero_grad(set_to_none=True)  # so that the graph makes them, in its own memory
            try:
                # Only this thread is watched: the one that pins the next batches may go on allocating.
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.result = compute(self.images)
            except RuntimeError as error:
                raise RuntimeError(
                    f"cuda_graph: the step cannot be recorded ({error}). Leave cuda_graph out; if a backend is forced, "
                    "'reference' is one that waits for the GPU"
                ) from error

    def _warm_up(self, compute: Callable, model: nn.Module, changed: list[torch.Tensor], stream) -> None:
        before = [t.clone() for t in changed]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                model.zero_grad(set_to_none=True)
                compute(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The result of `compute(images)`, which the next replay overwrites.

        Raises:
            ValueError: the images' shape or dtype are not the recorded ones.
        """
        if images.shape != self.images.shape or images.dtype != self.images.dtype:
            raise ValueError(
                f"cuda_graph: the step was recorded for images {tuple(self.images.shape)} of {self.images.dtype}; got "
                f"{tuple(images.shape)} of {images.dtype}"
            )
        self.images.copy_(images, non_blocking=True)
        self.graph.replay()
        return self.result
