"""A training step as a CUDA graph, recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from spark_fast.train.tensor_step import TensorStep

WARM_UP = 3  # runs before the recording, in which libraries choose their kernels and tables are made


class RecordedStep:
    """`gradients(images)`, which fills the parameters' gradients, and the optimiser's `update()`, as a CUDA graph that
    is launched as one piece.

    Results are those of the calls that it stands for: masks and drop path are drawn from the default generator as it is
    seeded before each replay, the schedule is the one that the optimiser's groups have then, and what the warm-up
    changed is put back. The gradients lie in the graph's own memory and are written anew by each replay, so that they
    must not be set to None in between. Nothing else that the two do in Python is done again, and no other number that
    they read from Python changes.

    Args:
        gradients: takes images (B, C, H, W) and returns a tensor; it must not wait for the GPU.
        update: the step of the optimiser of the model's parameters.
        model: whose parameters get the gradients.
        changed: tensors besides the model's that `gradients` changes in place.
        images: an example on the GPU; later ones have its shape and dtype.

    Raises:
        RuntimeError: the step cannot be recorded.
    """

    def __init__(
        self,
        gradients: Callable[[torch.Tensor], torch.Tensor],
        update: TensorStep,
        model: nn.Module,
        changed: Sequence[torch.Tensor],
        images: torch.Tensor,
    ):
        self.gradients, self.update = gradients, update
        self.images = images.clone(memory_format=torch.contiguous_format)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(images.device)
        with torch.cuda.device(images.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up(model, changed)
            torch.cuda.current_stream().wait_stream(stream)
            model.zero_grad(set_to_none=True)  # so that the graph makes them, in its own memory
            try:
                # Only this thread is watched: the one that pins the next batches may go on allocating.
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.result = self.run()
            except RuntimeError as error:
                raise RuntimeError(
                    f"cuda_graph: the step cannot be recorded ({error}). Leave cuda_graph out; if a backend is forced, "
                    "'reference' is one that waits for the GPU"
                ) from error

    def run(self) -> torch.Tensor:
        """What is recorded."""
        result = self.gradients(self.images)
        self.update()
        return result

    def _warm_up(self, model: nn.Module, changed: Sequence[torch.Tensor]) -> None:
        with _put_back([*model.buffers(), *changed]):
            for _ in range(WARM_UP):
                model.zero_grad(set_to_none=True)
                self.gradients(self.images)
        self.update.begin()  # only now is known which parameters have gradients
        with _put_back(self.update.changed):
            for _ in range(WARM_UP):
                self.update()  # at rate 0, which leaves the parameters as they are

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Take a step; what `gradients(images)` returns, which the next replay overwrites.

        Raises:
            ValueError: the images' shape or dtype are not the recorded ones.
        """
        if images.shape != self.images.shape or images.dtype != self.images.dtype:
            raise ValueError(
                f"cuda_graph: the step was recorded for images {tuple(self.images.shape)} of {self.images.dtype}; got "
                f"{tuple(images.shape)} of {images.dtype}"
            )
        self.images.copy_(images, non_blocking=True)
        self.update.write_schedule()
        self.graph.replay()
        self.update.count()
        return self.result


@contextmanager
def _put_back(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """The tensors have their values again afterwards."""
    before = [t.clone() for t in tensors]
    yield
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
