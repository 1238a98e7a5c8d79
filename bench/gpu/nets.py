"""Section "nets": encoders, forward + backward under bfloat16 autocast, against the best dense form; their memory."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import spark_fast as sf
from bench.gpu.measure import HALF, capture
from bench.gpu.section import NotAvailableError, Section
from bench.harness import significant
from bench.nets import dense_forms, model_kwargs, stir
from spark_fast.evaluate.speed import MaskedDense, alternate

MODELS = ("resnet50", "convnext_base")
RATIO = 0.6
PROVEN = 4  # images
NEAR = 2**-7  # relative: a rounding to bfloat16, twice; a tap left out would be farther


class HalfMaskedDense(MaskedDense):
    """Masks in the dtype of what they multiply: a float32 mask would turn a map under autocast into float32."""

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        key = (x.shape[2:], x.dtype)
        if key not in self.masks:
            self.masks[key] = nn.functional.interpolate(self.active, size=x.shape[2:]).to(x.dtype)
        return x * self.masks[key]


@dataclass(frozen=True)
class Batch:
    """Images and their active patches, the same number in each."""

    images: torch.Tensor
    active: torch.Tensor
    per_image: int

    def first(self, count: int) -> Batch:
        return Batch(self.images[:count], self.active[:count], self.per_image)


def batch_of(section: Section, count: int | None = None) -> Batch:
    size, count = (128, count or 2) if section.tiny else (224, count or 256)
    grid = (size // 32, size // 32)
    generator = torch.Generator().manual_seed(0)
    active = sf.random_patch_mask(count, grid, RATIO, generator).to(section.device)
    images = torch.randn(count, 3, size, size, device=section.device)
    return Batch(images, active, int(active[0].sum()))


def halved(section: Section, run: Callable[[Batch], dict]) -> dict:
    """`run` on the largest batch that fits the GPU's memory."""
    count = 2 if section.tiny else 256
    while True:
        out_of_memory = False
        try:
            return {"batch": count, **run(batch_of(section, count))}
        except torch.OutOfMemoryError:
            out_of_memory = count > 16
            if not out_of_memory:
                raise
        count //= 2  # outside of the handler, whose exception holds tensors
        gc.collect()
        torch.cuda.empty_cache()


def run(section: Section) -> None:
    torch.backends.cudnn.benchmark = True
    for model in MODELS:
        section.case(f"{model} encoder", lambda model=model: _encoder(section, model))
        section.case(f"{model} encoder memory", lambda model=model: _memory(section, model), optional=section.tiny)


def make_encoder(model: str, device: str) -> sf.Encoder:
    torch.manual_seed(0)
    return stir(sf.Encoder(model, model_kwargs=model_kwargs(model))).to(device)


def forms_of(encoder: sf.Encoder, active: torch.Tensor) -> dict[str, HalfMaskedDense]:
    device = active.device
    return {name: HalfMaskedDense(form.to(device), active) for name, form in dense_forms(encoder).items()}


def sparse_maps(encoder: sf.Encoder, batch: Batch) -> list[torch.Tensor]:
    patches = sf.ActivePatches(batch.active, batch.per_image)
    return [m.features for m in encoder(sf.SparseTensor.from_dense(batch.images, patches))]


def loss_of(maps: list[torch.Tensor]) -> torch.Tensor:
    return sum(m.float().square().mean() for m in maps)


def half(device: torch.device | str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, HALF)


def pass_of(model: nn.Module, maps: Callable[[], list[torch.Tensor]], device: torch.device) -> Callable[[], None]:
    """Forward and backward under autocast; gradients are made anew."""

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with half(device):
            loss = loss_of(maps())
        loss.backward()

    return run


def _encoder(section: Section, model: str) -> dict:
    encoder = make_encoder(model, section.device)
    proof = prove(encoder, batch_of(section).first(PROVEN))
    return {"proof": proof, **halved(section, lambda batch: _times(section, encoder, batch))}


def _times(section: Section, encoder: sf.Encoder, batch: Batch) -> dict:
    device = batch.images.device
    forms = forms_of(encoder, batch.active)
    channels_last = batch.images.contiguous(memory_format=torch.channels_last)
    sparse = pass_of(encoder.train(), lambda: sparse_maps(encoder, batch), device)
    runs, notes = with_graph("sparse", sparse, encoder, device)
    if len(runs) > 1:
        notes["graph_gap"] = graph_gap(*runs.values(), encoder)
    for name, form in forms.items():
        runs[f"dense {name}"] = pass_of(form.train(), lambda form=form: form(channels_last), device)
    return time_sides(runs, device, 1 if section.tiny else 7) | notes


def with_graph(
    name: str, gradients: Callable[[], None], model: nn.Module, device: torch.device, after: Callable = lambda: None
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """The run as Python makes it, and with its forward and backward replayed as a CUDA graph, where it can be recorded;
    else why not. `after`: what follows outside of the graph."""

    def called() -> None:
        gradients()
        after()

    try:
        replay = capture(gradients, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        return {name: called}, {"no_cuda_graph": str(error).splitlines()[0][:300]}
    if replay is None:
        return {name: called}, {}
    recorded = [parameter.grad for parameter in model.parameters()]

    def replayed() -> None:
        for parameter, gradient in zip(model.parameters(), recorded, strict=True):
            parameter.grad = gradient
        replay()
        after()

    return {name: called, f"{name}, CUDA graph": replayed}, {}


def graph_gap(called: Callable[[], None], replayed: Callable[[], None], model: nn.Module) -> float:
    """How far the gradients of a replay are from those of a call, relative.

    Raises:
        AssertionError: farther than rounding to bfloat16.
    """
    found = []
    for run in (called, replayed):
        run()
        found.append([p.grad.double() for p in model.parameters() if p.grad is not None])
    gap = distance(found[1], found[0])
    assert gap <= NEAR, f"gradients of the CUDA graph are {gap:.3g} away"
    return significant(gap, 3)


def time_sides(runs: Mapping[str, Callable[[], None]], device: torch.device, rounds: int) -> dict:
    """Milliseconds of all sides in turns; the gain of the fastest sparse form over the fastest dense form."""
    times = alternate(runs, rounds, 1, device)
    return gains_of({name: statistics.median(series) for name, series in times.items()})


def gains_of(seconds: Mapping[str, float]) -> dict:
    dense = {name: s for name, s in seconds.items() if name.startswith("dense")}
    sparse = {name: s for name, s in seconds.items() if name.startswith("sparse")}
    best, form = min(sparse, key=sparse.get), min(dense, key=dense.get)
    gains = {"dense": round(dense[form] / sparse[best], 3)}
    return {
        "ms": {n: significant(1e3 * s) for n, s in seconds.items()},
        "best": best,
        "dense_form": form,
        "gains": gains,
    }


def prove(encoder: sf.Encoder, batch: Batch) -> dict[str, float]:
    """Maps and gradients in evaluation mode, where dense batch norms mean the same: under autocast ours are at most
    twice as far from float64 as the dense ones, and a rounding. Distances are relative, in the Frobenius norm.

    Raises:
        AssertionError: they are farther.
    """
    images = batch.images.contiguous(memory_format=torch.channels_last)
    truth = _outcome(HalfMaskedDense(copy.deepcopy(encoder).double(), batch.active).eval(), images.double(), False)
    dense = _outcome(HalfMaskedDense(copy.deepcopy(encoder), batch.active).eval(), images, True)
    ours = _outcome(_SparseMaps(copy.deepcopy(encoder), batch).eval(), images, True)
    found = {}
    for number, what in enumerate(("maps", "gradients")):
        mine, theirs = (distance(side[number], truth[number]) for side in (ours, dense))
        found[what], found[f"dense {what}"] = significant(mine, 3), significant(theirs, 3)
        assert mine <= 2 * theirs + NEAR, f"sparse {what} are {mine:.3g} off float64, dense ones {theirs:.3g}"
    return found


class _SparseMaps(nn.Module):
    """The sparse encoder's maps, zero-filled."""

    def __init__(self, encoder: sf.Encoder, batch: Batch):
        super().__init__()
        self.encoder, self.batch = encoder, batch

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        patches = sf.ActivePatches(self.batch.active, self.batch.per_image)
        return [m.to_dense() for m in self.encoder(sf.SparseTensor.from_dense(images, patches))]


def _outcome(model: nn.Module, images: torch.Tensor, autocast: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.autocast(images.device.type, HALF, enabled=autocast):
        maps = model(images)
        loss_of_norms(maps).backward()
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return [m.detach().double() for m in maps], gradients


def loss_of_norms(maps: list[torch.Tensor]) -> torch.Tensor:
    """Each map weighs the same however large it is."""
    wide = [m if m.dtype == torch.float64 else m.float() for m in maps]
    return sum(m.square().sum() / m.detach().square().sum().clamp(min=1e-30) for m in wide)


def distance(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """Of all tensors together."""
    off = sum(float((a - b).square().sum()) for a, b in zip(ours, truth, strict=True))
    return (off / sum(float(b.square().sum()) for b in truth)) ** 0.5


def _memory(section: Section, model: str) -> dict:
    if section.device != "cuda":
        raise NotAvailableError("the allocator of a GPU counts this")
    return halved(section, lambda batch: _memory_of_both(section, model, batch))


def _memory_of_both(section: Section, model: str, batch: Batch) -> dict:
    """GiB that a forward + backward adds at its peak, and what is kept between the two."""
    peaks, kept = {}, {}
    encoder, device = make_encoder(model, section.device).train(), batch.images.device
    channels_last = batch.images.contiguous(memory_format=torch.channels_last)
    peaks["sparse"], kept["sparse"] = _grown(encoder, lambda: sparse_maps(encoder, batch), device)
    for name, form in forms_of(encoder, batch.active).items():
        peaks[f"dense {name}"], kept[f"dense {name}"] = _grown(
            form.train(), lambda form=form: form(channels_last), device
        )
    least = min(gib for name, gib in peaks.items() if name.startswith("dense"))
    shares = {"dense": round(peaks["sparse"] / least, 3)}
    return {"peak_gib": peaks, "kept_gib": kept, "shares": shares}


def _grown(model: nn.Module, maps: Callable[[], list[torch.Tensor]], device: torch.device) -> tuple[float, float]:
    run = pass_of(model, maps, device)
    run()  # masks, workspaces, gradients
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with half(device):
        loss = loss_of(maps())
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return significant(peak / 2**30), significant(kept / 2**30)
