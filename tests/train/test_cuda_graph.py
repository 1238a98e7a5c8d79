"""Steps recorded as a CUDA graph: the same numbers, and nothing that waits; on a CPU with a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from watching import no_waiting

from spark_fast.train import PretrainConfig, loop, pretrain
from spark_fast.train.cuda_graph import RecordedGradients
from spark_fast.train.schedule import set_schedule


class StandIn:
    """torch.cuda as `RecordedGradients` uses it. A recording leaves no result; a replay computes, and writes the
    gradients where they lay in the recording, over whatever they held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        waits = SimpleNamespace(wait_stream=lambda other: None)
        parts = {
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "Stream": lambda device: waits,
            "current_stream": lambda: waits,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "graph": self.record,
        }
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(loop, "RecordedGradients", self.make)
        self.replays = 0

    def make(self, compute, model, changed, images):
        self.compute, self.model, self.changed = compute, model, [*model.buffers(), *changed]
        self.made = RecordedGradients(compute, model, changed, images)
        return self.made

    @contextlib.contextmanager
    def record(self, graph, stream, capture_error_mode):
        assert all(p.grad is None for p in self.model.parameters())
        before = [t.clone() for t in self.changed]
        with no_waiting():
            yield
        with torch.no_grad():
            for tensor, value in zip(self.changed, before, strict=True):
                tensor.copy_(value)
        self.places = [p.grad for p in self.model.parameters()]
        for place in filter(lambda grad: grad is not None, self.places):
            place.fill_(torch.nan)

    def replay(self):
        self.replays += 1
        assert all(p.grad is place for p, place in zip(self.model.parameters(), self.places, strict=True))
        self.model.zero_grad(set_to_none=True)
        self.made.result.copy_(self.compute(self.made.images))
        for parameter, place in zip(self.model.parameters(), self.places, strict=True):
            if place is not None:
                place.copy_(parameter.grad)
            parameter.grad = place


def run_steps(config: PretrainConfig, device: str, steps: int) -> tuple[loop.State, list[torch.Tensor]]:
    state, norms = loop._make_state(config, torch.device(device), fresh=True), []
    for step in range(steps):
        images = torch.randn(config.batch_size, 3, *config.size, generator=torch.Generator().manual_seed(step))
        set_schedule(state.optimizer, 1e-3 * (step + 1), 0.1 * step)
        norms.append(loop._step(config, state, images.to(device), step).clone())
    return state, norms


CHANGES = {
    "lamb": {},
    "adamw, drop path": {"opt": "adamw", "drop_path": 0.5},
    "micro-batches, bfloat16": {"grad_accum_steps": 2, "amp_dtype": "bfloat16"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_recorded_steps_are_the_plain_ones(settings, monkeypatch, change):
    """Warm-up, seeds, gradients and statistics, bit for bit; and no step records anew."""
    plain, norms = run_steps(PretrainConfig(**{**settings, **CHANGES[change]}), "cpu", 3)
    stand_in = StandIn(monkeypatch)
    config = PretrainConfig(**{**settings, **CHANGES[change], "cuda_graph": True})
    recorded, recorded_norms = run_steps(config, "cpu", 3)
    assert stand_in.replays == 3
    assert torch.equal(torch.stack(norms), torch.stack(recorded_norms)) and bool(norms[0] > 0)
    assert torch.equal(plain.loss_sum, recorded.loss_sum) and plain.steps == recorded.steps == 3
    assert bool(recorded.finite) and bool(plain.finite)
    theirs = recorded.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in plain.model.state_dict().items())


def test_images_of_another_shape_are_refused(settings, monkeypatch):
    StandIn(monkeypatch)
    config = PretrainConfig(**settings, cuda_graph=True)
    state, _ = run_steps(config, "cpu", 1)
    with pytest.raises(ValueError, match=r"cuda_graph: .*\(4, 3, 64, 64\).*got \(3, 3, 64, 64\)"):
        loop._step(config, state, torch.randn(3, 3, 64, 64), 1)


def test_what_cannot_be_recorded_is_told(settings, monkeypatch):
    StandIn(monkeypatch)

    @contextlib.contextmanager
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(RuntimeError, match=r"cuda_graph: .*not permitted.*Leave cuda_graph out"):
        run_steps(PretrainConfig(**settings, cuda_graph=True), "cpu", 1)


def test_a_cpu_and_float16_are_refused(settings):
    with pytest.raises(ValueError, match="cuda_graph is True, which needs a CUDA GPU; the device is cpu"):
        pretrain(**settings, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph is True, need False with amp_dtype='float16'"):
        pretrain(**settings, cuda_graph=True, amp_dtype="float16")
    with pytest.raises(TypeError, match="cuda_graph"):
        PretrainConfig(**settings, cuda_graph="yes").check()


def test_a_run_may_go_on_with_it(settings):
    stored = PretrainConfig(**settings)
    assert PretrainConfig(**settings, cuda_graph=True).changed_since(stored) == []


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_recorded_steps_on_a_gpu(settings, change):
    """The kernels may differ in the order of sums between the two, the draws may not."""
    changed = {**settings, **CHANGES[change], "device": "cuda"}
    plain, norms = run_steps(PretrainConfig(**changed), "cuda", 3)
    recorded, recorded_norms = run_steps(PretrainConfig(**changed, cuda_graph=True), "cuda", 3)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if "bfloat16" in change else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(torch.stack(recorded_norms), torch.stack(norms), **tolerance)
    torch.testing.assert_close(recorded.loss_sum, plain.loss_sum, **tolerance)
    theirs = recorded.model.state_dict()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
