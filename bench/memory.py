"""Peak memory of an encoder's forward + backward, in a process of its own: `python -m bench.memory SIDE MODEL BATCH`.

Counted: the growth of the resident set from just before one step to its peak, with the default allocator. Parameters,
their gradients, images and masks exist before, and so do the libraries' kernels: a step on one image ran first, and
what it freed was returned to the system. So it is what a step itself needs: activations kept for the backward pass,
temporaries, and gradients of activations.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import spark_fast as sf
from bench.nets import dense_forms, model_kwargs
from bench.settings import MASK_RATIO, SIZE
from spark_fast.evaluate.speed import MaskedDense

MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def missing() -> str | None:
    """Why the peak cannot be measured here, or None."""
    return None if CLEAR.exists() else "there is no /proc/self/clear_refs (Linux) to reset the peak resident set"


def in_own_process(side: str, model: str, batch: int) -> float:
    """MiB of `side`, "sparse" or a name in `dense_forms`."""
    command = [sys.executable, "-m", "bench.memory", side, model, str(batch)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout)["mib"]


def peak(side: str, model: str, batch: int) -> float:
    """MiB that one step adds at its peak."""
    encoder = sf.Encoder(model, model_kwargs=model_kwargs(model))
    module, prepare = (encoder, _sparse) if side == "sparse" else (dense_forms(encoder)[side], _dense)
    module.train()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    prepare(module, 1)()
    step = prepare(module, batch)
    del encoder
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / MIB


def _inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, SIZE, SIZE), sf.random_patch_mask(batch, (SIZE // 32, SIZE // 32), MASK_RATIO)


def _sparse(module: sf.Encoder, batch: int) -> Callable[[], None]:
    images, active = _inputs(batch)
    patches = sf.ActivePatches(active)

    def step() -> None:
        maps = module(sf.SparseTensor.from_dense(images, patches))
        sum(m.features.square().mean() for m in maps).backward()

    return step


def _dense(module: sf.Encoder, batch: int) -> Callable[[], None]:
    images, active = _inputs(batch)
    dense = MaskedDense(module, active).train()
    for parameter in dense.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for side in (1, 2, 4, 8, 16, 32):
        dense.mask(torch.zeros(batch, 1, SIZE // 32 * side, SIZE // 32 * side))
    images = images.contiguous(memory_format=torch.channels_last)
    return lambda: sum(m.square().mean() for m in dense(images)).backward()


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    side, model, batch = sys.argv[1:]
    print(json.dumps({"mib": peak(side, model, int(batch))}))
