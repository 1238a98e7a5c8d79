"""What this machine can do at best, measured in the same run as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.settings import TINY


@dataclass(frozen=True)
class Ceilings:
    """gemm: FLOP/s of a large matrix product or dense convolution, the faster. copy: bytes/s, read and written."""

    gemm: float
    copy: float

    def floor(self, flops: float, size: float) -> float:
        """Seconds that direct arithmetic, or moving `size` bytes from and to memory, takes at least."""
        return max(flops / self.gemm, size / self.copy)


def measure_ceilings() -> Ceilings:
    n = 256 if TINY else 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    gemm = 2 * n**3 / _best(lambda: torch.mm(a, b))
    batch, channels, side = (1, 32, 16) if TINY else (8, 256, 56)
    x = torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    dense = 2 * x.numel() * channels * 9 / _best(lambda: F.conv2d(x, w, padding=1))
    source = torch.randn(2**18 if TINY else 2**26)  # 256 MiB: larger than any cache
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source))
    return Ceilings(max(gemm, dense), copy)


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(2 if TINY else 6):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
