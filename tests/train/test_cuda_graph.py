"""Steps recorded as a CUDA graph: the same numbers, and nothing that waits; on a CPU with a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from watching import no_waiting

from spark_fast.train import PretrainConfig, loop, pretrain
from spark_fast.train.checkpoint import load_checkpoint, save_checkpoint
from spark_fast.train.cuda_graph import RecordedStep
from spark_fast.train.schedule import set_schedule
from spark_fast.train.tensor_step import TensorStep


class StandIn:
    """torch.cuda as `RecordedStep` uses it. A recording leaves no result; a replay computes, without reading from the
    host what it could not, and writes the gradients where they lay in the recording, over whatever they held."""

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
        monkeypatch.setattr(loop, "RecordedStep", self.make)
        self.replays = 0

    def make(self, gradients, update, model, changed, images):
        self.model, self.update, self.changed = model, update, changed
        self.made = RecordedStep(gradients, update, model, changed, images)
        return self.made

    @contextlib.contextmanager
    def record(self, graph, stream, capture_error_mode):
        assert all(p.grad is None for p in self.model.parameters())
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.changed, *self.update.changed]
        before = [t.detach().clone() for t in tensors]
        with no_waiting():
            yield
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        self.places = [p.grad for p in self.model.parameters()]
        for place in filter(lambda grad: grad is not None, self.places):
            place.fill_(torch.nan)
        self.groups = [dict(group) for group in self.update.optimizer.param_groups]

    def replay(self):
        self.replays += 1
        assert all(p.grad is place for p, place in zip(self.model.parameters(), self.places, strict=True))
        self.model.zero_grad(set_to_none=True)
        current = [dict(group) for group in self.update.optimizer.param_groups]
        for group, recorded in zip(self.update.optimizer.param_groups, self.groups, strict=True):
            group.update(recorded)  # a replay knows the numbers of the recording only
        self.made.result.copy_(self.made.run())
        for group, now in zip(self.update.optimizer.param_groups, current, strict=True):
            group.update(now)
        for parameter, place in zip(self.model.parameters(), self.places, strict=True):
            if place is not None:
                place.copy_(parameter.grad)
            parameter.grad = place


def take_steps(state: loop.State, config: PretrainConfig, device: str, first: int, last: int) -> list[torch.Tensor]:
    """Steps first..last-1 of a run; the gradients' norms."""
    norms = []
    for step in range(first, last):
        images = torch.randn(config.batch_size, 3, *config.size, generator=torch.Generator().manual_seed(step))
        set_schedule(state.optimizer, 1e-3 * (step + 1), 0.1 * step)
        norms.append(loop._step(config, state, images.to(device), step).clone())
    return norms


def run_steps(config: PretrainConfig, device: str, steps: int) -> tuple[loop.State, list[torch.Tensor]]:
    state = loop._make_state(config, torch.device(device), fresh=True)
    return state, take_steps(state, config, device, 0, steps)


def run_steps_of_tensors(config: PretrainConfig, steps: int) -> tuple[loop.State, list[torch.Tensor]]:
    """Without a recording, but with the update that a recording has."""
    state = loop._make_state(config, torch.device("cpu"), fresh=True)
    update = TensorStep(state.optimizer)

    def step() -> None:
        if not update.parts:
            update.begin()
        update.write_schedule()
        update()
        update.count()

    state.optimizer.step = step
    return state, take_steps(state, config, "cpu", 0, steps)


CHANGES = {
    "lamb": {},
    "adamw, drop path": {"opt": "adamw", "drop_path": 0.5},
    "micro-batches, bfloat16": {"grad_accum_steps": 2, "amp_dtype": "bfloat16"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_recorded_steps_are_those_not_recorded(settings, monkeypatch, change):
    """Warm-up, seeds, gradients, statistics, schedule and moments, bit for bit; and no step records anew."""
    plain, norms = run_steps_of_tensors(PretrainConfig(**{**settings, **CHANGES[change]}), 3)
    stand_in = StandIn(monkeypatch)
    config = PretrainConfig(**{**settings, **CHANGES[change], "cuda_graph": True})
    recorded, recorded_norms = run_steps(config, "cpu", 3)
    assert stand_in.replays == 3
    assert torch.equal(torch.stack(norms), torch.stack(recorded_norms)) and bool(norms[0] > 0)
    assert torch.equal(plain.loss_sum, recorded.loss_sum) and plain.steps == recorded.steps == 3
    assert bool(recorded.finite) and bool(plain.finite)
    torch.testing.assert_close(recorded.to_dict(), plain.to_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("opt", ["lamb", "adamw"])
def test_a_checkpoint_goes_on_with_and_without(settings, tmp_path, monkeypatch, opt):
    """In float64: plain steps, the same with a recording in the middle, and with one before and after."""
    StandIn(monkeypatch)
    torch.set_default_dtype(torch.float64)
    try:
        results = []
        for recordings in ((False, False, False), (False, True, False), (True, False, True)):
            state = None
            for part, recorded in enumerate(recordings):
                config = PretrainConfig(**{**settings, "opt": opt, "cuda_graph": recorded})
                path = tmp_path / "checkpoint.pth"
                if state is not None:
                    save_checkpoint(path, config, state.to_dict())
                state = loop._make_state(config, torch.device("cpu"), fresh=state is None)
                if part:
                    state.load(load_checkpoint(path), path)
                take_steps(state, config, "cpu", 2 * part, 2 * part + 2)
            results.append(state.to_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    for result in results[1:]:
        torch.testing.assert_close(result["model"], results[0]["model"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result["optimizer"]["state"], results[0]["optimizer"]["state"], rtol=1e-9, atol=1e-9)
        assert result["optimizer"]["param_groups"] == results[0]["optimizer"]["param_groups"]


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
