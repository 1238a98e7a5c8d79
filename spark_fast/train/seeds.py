"""Random numbers as a function of what they are for, so that no random state needs saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

INIT, ORDER, SAMPLE, SUBSTITUTE, STEP, PICTURE = range(6)


def derive_seed(seed: int, purpose: int, *counters: int) -> int:
    """Mix a run's seed, one of the purposes above and counters (epoch, index, step...) into a 63-bit seed."""
    mixed = np.random.SeedSequence((seed, purpose, *counters)).generate_state(1, np.uint64)[0]
    return int(mixed) >> 1


def generator(seed: int, purpose: int, *counters: int) -> torch.Generator:
    """A CPU generator seeded by derive_seed."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *counters))


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block and put its state back after it."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
