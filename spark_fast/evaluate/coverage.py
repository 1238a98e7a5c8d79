"""Which of timm's networks run sparsely, and whether they do it right: four checks of each.

What the values are under a mask is not compared here, for want of a network to compare with: the tests prove it rule by
rule (tests/rules, tests/ops) and for whole networks against a dense simulation (tests/test_encoder.py).

A network is convolutional here if nothing in it mixes positions but convolutions, pooling, resizing and statistics over
the whole image. Those that attend over positions, scan them or mix them by matrices of a fixed length are left out:
whole families of them by name (EXCLUDED), single ones by the modules that they hold (MIXERS).
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import timm
import torch
from torch import nn

from spark_fast.encoder import Encoder
from spark_fast.files import write_text
from spark_fast.mask import random_patch_mask
from spark_fast.patches import ActivePatches
from spark_fast.rules.dense import noted_fallbacks
from spark_fast.spark import SparK
from spark_fast.tensor import SparseTensor

TRANSFORMER, HYBRID = "vision transformer: attention over patches", "hybrid: attention over positions in later stages"
CROSS = "cross-covariance attention: attention over channels, of positions as a sequence"
WINDOWS, MLP = "attention over windows of positions", "matrices or recurrences over positions"
_FAMILIES = {
    TRANSFORMER: (
        "beit cait convit crossvit deepseek_vit deit eva gemma4_vit naflexvit pit qwen3_vit tnt vision_transformer "
        "vision_transformer_relpos vision_transformer_sam volo"
    ),
    HYBRID: (
        "byoanet coat cpubone csatv2 efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra "
        "iformer levit lowformer maxxvit mobilenetv5 mobilevit mvitv2 nextvit pvt_v2 shvit swiftformer tiny_vit twins "
        "vision_transformer_hybrid visformer vitamin"
    ),
    CROSS: "edgenext xcit",
    WINDOWS: "davit gcvit hiera hieradet_sam2 nest swin_transformer swin_transformer_v2 swin_transformer_v2_cr",
    MLP: "efficientvim mlp_mixer sequencer",
}
EXCLUDED = {family: reason for reason, names in _FAMILIES.items() for family in names.split()}
# Modules of single networks in convolutional families.
MIXERS = (
    "Attention",
    "Attention2d",
    "MobileAttention",
    "MultiQueryAttention2d",
    "BilinearAttnTransform",
    "LambdaLayer",
)

EXACT, SINGLE = 1e-8, 1e-4  # of a norm: in float64, and for networks that compute in float32 even then:
LEAST = 1e-4  # of the largest gradient's norm: smaller ones, some of them 0 but for rounding, are compared with that
COMPUTE_IN_SINGLE = ("EvoNorm", "FilterResponse", "LayerNormFp32", "LayerNorm2dFp32", "RmsNormFp32", "RmsNorm2dFp32")
GRID, BATCH = (3, 4), 2


@dataclass
class Coverage:
    """What was found for one architecture.

    Attributes:
        family: timm's module.
        parameters: of the backbone.
        dense_error: largest relative difference (Frobenius, float64) of maps and parameters' gradients between a
            sparse run without masked pixels and the dense network, in training mode; `limit`: what is accepted.
        leak_free: masked pixels may be NaN: the maps stay finite and, to the bit, what they are with other values
            there, and no gradient reaches them.
        gradients: every parameter that has a gradient in the dense network has a finite one.
        step: the loss of one step of pre-training is finite and the step changed the backbone.
        fallback_share: of the encoder's time, spent on dense maps; `fallbacks`: in these operations.
        error: why it did not run.
    """

    name: str
    family: str
    parameters: int = 0
    strides: list[int] = field(default_factory=list)
    dense_error: float = math.nan
    limit: float = EXACT
    leak_free: bool = False
    gradients: bool = False
    step: bool = False
    fallback_share: float = 0.0
    fallbacks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.dense_error <= self.limit and self.leak_free and self.gradients and self.step


@dataclass(frozen=True)
class Candidate:
    """A convolutional architecture, with the number of its parameters."""

    name: str
    family: str
    parameters: int


def families() -> dict[str, list[str]]:
    """timm's modules that are not left out as a whole, with their architectures."""
    return {module: timm.list_models(module=module) for module in timm.list_modules() if module not in EXCLUDED}


@cache
def _families_of() -> dict[str, str]:
    """timm's module of each architecture."""
    return {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}


def candidates(names: Iterable[str]) -> tuple[list[Candidate], dict[str, str]]:
    """The convolutional ones among `names`, and for each of the others why it is left out."""
    found, left_out = [], {}
    for name in names:
        family = _families_of()[name]
        if family in EXCLUDED:
            left_out[name] = EXCLUDED[family]
            continue
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        mixers = sorted({type(m).__name__ for m in model.modules()} & set(MIXERS))
        if mixers:
            left_out[name] = f"holds {', '.join(mixers)}"
        else:
            found.append(Candidate(name, family, sum(p.numel() for p in model.parameters())))
    return found, left_out


def selected(pattern: str | None, every: bool) -> tuple[list[Candidate], dict[str, str]]:
    """Architectures to check: all that match `pattern`, or all; or else the smallest of each family.

    Raises:
        ValueError: nothing matches.
    """
    names = [name for members in families().values() for name in members]
    if pattern is not None:
        names = fnmatch.filter(timm.list_models(), pattern)
        if not names:
            near = difflib.get_close_matches(pattern, timm.list_models(), n=5)
            hint = f" Near it: {', '.join(near)}." if near else " timm.list_models() lists them"
            raise ValueError(f"filter={pattern!r} matches no architecture of timm.{hint}")
    if pattern is None:
        print(f"Looking through {len(names)} architectures, for about two minutes.", flush=True)
    found, left_out = candidates(names)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise ValueError(f"filter={pattern!r} matches only networks that are not convolutional ({reasons})")
    if pattern is None and not every:
        smallest: dict[str, Candidate] = {}
        for candidate in sorted(found, key=lambda c: c.parameters):
            smallest.setdefault(candidate.family, candidate)
        found = list(smallest.values())
    return sorted(found, key=lambda c: (c.family, c.name)), left_out


def check(candidate: Candidate, seed: int = 0) -> Coverage:
    """Runs the four checks. Never raises for what the network does: `error` tells it."""
    row = Coverage(candidate.name, candidate.family, candidate.parameters)
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            _check(row)
    except Exception as error:
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    row.seconds = time.perf_counter() - started
    return row


def _check(row: Coverage) -> None:
    encoder = Encoder(row.name)
    row.strides = encoder.strides
    _stir(encoder)
    if any(type(m).__name__.startswith(COMPUTE_IN_SINGLE) for m in encoder.modules()):
        row.limit = SINGLE
    # In training mode, where norms keep a deep network's values in range: without them rounding grows by its depth.
    encoder.double().train()
    for module in encoder.modules():
        if "Drop" in type(module).__name__:
            module.eval()
    # The mask's unit is at least 32 pixels: below 96 some networks' maps are smaller than their kernels.
    side = encoder.total_stride * max(1, 32 // encoder.total_stride)
    images = torch.randn(BATCH, 3, GRID[0] * side, GRID[1] * side, dtype=torch.float64)
    whole = ActivePatches(torch.ones(BATCH, *GRID, dtype=torch.bool))
    sparse = encoder(SparseTensor.from_dense(images, whole))
    weights = [torch.randn_like(x.features) for x in sparse]
    mine = _gradients(encoder, [x.features for x in sparse], weights)
    dense = encoder.feature_maps(images)
    rows = [SparseTensor.from_dense(x, whole).features for x in dense]
    theirs = _gradients(encoder, rows, weights)
    pairs = [(x.features, y) for x, y in zip(sparse, rows, strict=True)]
    scale = max(float(g.norm()) for g in theirs.values())
    row.dense_error = max(_apart(x, y) for x, y in pairs)
    row.gradients = mine.keys() == theirs.keys() and all(g.isfinite().all() for g in mine.values())
    if row.gradients:
        row.dense_error = max(row.dense_error, *(_apart(mine[n], theirs[n], scale * LEAST) for n in theirs))
    del dense, rows, mine, theirs, pairs
    encoder.eval()
    row.leak_free = _is_leak_free(encoder, images, side)
    row.step = _trains(row, side)


def _stir(model: nn.Module) -> None:
    """Makes what starts at 0, at 1 or tiny all different: branches that end in a zero would hide what they do."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() <= 1 or p.abs().max() < 1e-3:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                b.normal_(0.0, 0.1)


def _gradients(encoder: nn.Module, outputs: list[torch.Tensor], weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    # Each map alike, whatever its size.
    total = sum((x * w).sum() / x.detach().norm().clamp(min=1e-30) for x, w in zip(outputs, weights, strict=True))
    total.backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def _apart(mine: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    mine, theirs = mine.detach(), theirs.detach()
    apart = float((mine - theirs).norm()) / max(float(theirs.norm()), floor, 1e-300)
    return apart if math.isfinite(apart) else math.inf


def _is_leak_free(encoder: Encoder, images: torch.Tensor, side: int) -> bool:
    active = random_patch_mask(BATCH, GRID, 0.6)
    patches = ActivePatches(active)
    mask = active[:, None].repeat_interleave(side, 2).repeat_interleave(side, 3)
    hidden = torch.where(mask, images, torch.nan).requires_grad_()
    maps = encoder(SparseTensor.from_dense(hidden, patches))
    sum(x.features.sum() for x in maps).backward()
    other = encoder(SparseTensor.from_dense(torch.where(mask, images, 7.0), patches))
    same = all(
        torch.equal(x.features, y.features) and x.features.isfinite().all() for x, y in zip(maps, other, strict=True)
    )
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in encoder.parameters())
    return same and finite and not bool(hidden.grad.masked_fill(mask, 0).any())


def _trains(row: Coverage, side: int) -> bool:
    model = SparK(row.name, (GRID[0] * side, GRID[1] * side), patch_size=side, decoder_width=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [p.detach().clone() for p in model.encoder.parameters()]
    images = torch.randn(BATCH, 3, *model.img_size)
    patches = ActivePatches(model.random_mask(BATCH))
    with noted_fallbacks() as notes:
        started = time.perf_counter()
        model.encoder(SparseTensor.from_dense(images, patches))
        whole = time.perf_counter() - started
    row.fallback_share = sum(note.seconds for note in notes) / whole
    row.fallbacks = sorted({note.operation for note in notes})
    loss = model(images, patches.active)
    loss.backward()
    optimizer.step()
    after = list(model.encoder.parameters())
    changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return bool(loss.isfinite()) and changed and all(bool(p.isfinite().all()) for p in after)


@dataclass
class Results:
    """What a run found, with the versions it was found with, and why other networks were left out."""

    versions: dict[str, str]
    networks: list[Coverage]
    left_out: dict[str, str]


def run(pattern: str | None = None, every: bool = False, most: int = 150_000_000, out: Path | None = None) -> Results:
    """Checks architectures one after the other and prints a line for each.

    Args:
        pattern: shell pattern of names; None: the smallest of each family.
        every: with no pattern, all architectures.
        most: leaves out networks with more parameters.
        out: JSON file, written after each network. What it holds is not checked again if versions are the same.

    Raises:
        ValueError: `pattern` matches nothing, or `out` is no such file.
    """
    earlier = load(out) if out is not None and out.exists() else Results({}, [], {})
    results = Results(_versions(), [], {})
    known = {row.name: row for row in earlier.networks} if earlier.versions == results.versions else {}
    found, results.left_out = selected(pattern, every)
    for candidate in found:
        if candidate.parameters > most:
            results.left_out[candidate.name] = f"more than {most / 1e6:g} M parameters: not run"
            continue
        row = known.get(candidate.name) or check(candidate)
        results.networks.append(row)
        print(_line(row) + (f", from {out}" if candidate.name in known else ""), flush=True)
        if out is not None:
            save(out, results)
    if not results.networks:
        raise ValueError(f"max_parameters: all {len(found)} networks have more than {most / 1e6:g} M parameters")
    return results


def _versions() -> dict[str, str]:
    import spark_fast

    return {"spark_fast": spark_fast.__version__, "torch": torch.__version__, "timm": timm.__version__}


def save(path: Path, results: Results) -> None:
    write_text(path, json.dumps(asdict(results), indent=1) + "\n")


def load(path: Path) -> Results:
    """What `save` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        content = json.loads(path.read_text())
        networks = [Coverage(**row) for row in content["networks"]]
        return Results(content["versions"], networks, content["left_out"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"out={path} is not a file that `spark-fast coverage` wrote: {error}") from error


def _line(row: Coverage) -> str:
    state = "passed" if row.passed else "FAILED"
    text = f"{state} {row.name} ({row.family}, {row.parameters / 1e6:.1f} M): "
    if row.error:
        return text + row.error
    fallback = f", {row.fallback_share:.0%} in {', '.join(row.fallbacks)}" if row.fallbacks else ""
    if not row.passed:
        failed = [name for name in ("leak_free", "gradients", "step") if not getattr(row, name)]
        fallback += f", failed: {', '.join(failed) or 'dense'}"
    return f"{text}dense error {row.dense_error:.1e}{fallback}, {row.seconds:.1f} s"


INTRODUCTION = """# Networks that run sparsely

Made by `spark-fast coverage`, which does four things with each network of timm:

1. **Dense**: with no pixel masked, all feature maps and all parameters' gradients equal those of the unmodified dense
   network, in training mode and float64, to {exact:g} (relative, Frobenius norms; {single:g} where modules of timm
   compute in float32 even then: EvoNorm, filter response norm; a gradient below {least:g} of the largest one counts as
   that). Parameters are made generic first, so that no branch is multiplied by an initial zero.
2. **No leak**: masked pixels hold NaN; maps and gradients stay finite, the maps are to the bit the same with other
   values there, and no gradient reaches a masked pixel.
3. **Gradients**: every parameter that gets a gradient in the dense network gets one.
4. **Step**: `SparK` trains for a step, and its loss and parameters are finite.

What the values are under a mask is not compared here, for want of a network to compare with: the tests prove it rule by
rule (tests/rules, tests/ops) and for whole networks against a dense simulation (tests/test_encoder.py).

A network is convolutional here if nothing mixes positions in it but convolutions, pooling, resizing and statistics over
the whole image. Every exclusion is listed below.

"""


def table(results: Results) -> str:
    """Markdown: a line for each family, then what did not pass, then what was left out and why."""
    rows, left_out = results.networks, results.left_out
    by_family: dict[str, list[Coverage]] = {}
    for row in rows:
        by_family.setdefault(row.family, []).append(row)
    passed = sum(all(row.passed for row in members) for members in by_family.values())
    counts = f"{sum(row.passed for row in rows)} of {len(rows)} networks, {passed} of {len(by_family)} families"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [
        f"**{counts} pass all four checks** ({versions}).",
        "",
        "| family | networks | passed | largest error | on dense maps |",
        "|---|---|---|---|---|",
    ]
    for family, members in sorted(by_family.items()):
        good = [row for row in members if row.passed]
        error = max((row.dense_error for row in good), default=math.nan)
        operations = sorted({operation for row in members for operation in row.fallbacks})
        share = max(row.fallback_share for row in members)
        dense = f"{'; '.join(operations)}: at most {share:.0%} of the encoder's time" if operations else "-"
        lines.append(f"| {family} | {len(members)} | {len(good)} | {error:.0e} | {dense} |")
    lines += ["", "## Not passed", ""]
    lines += [f"- {_line(row)}" for row in rows if not row.passed] or ["None."]
    lines += ["", "## Left out", "", "Families that are not convolutional:", ""]
    lines += [f"- {reason}: {', '.join(names.split())}" for reason, names in _FAMILIES.items()]
    single: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        if _families_of()[name] not in EXCLUDED:
            single.setdefault(reason, []).append(name)
    if single:
        lines += ["", "Networks of other families:", ""]
        lines += [f"- {reason}: {', '.join(sorted(names))}" for reason, names in sorted(single.items())]
    return INTRODUCTION.format(exact=EXACT, single=SINGLE, least=LEAST) + "\n".join(lines) + "\n"
