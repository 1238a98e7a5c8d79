"""What all benchmarks share. SPARK_FAST_BENCH=tiny makes every case tiny: a run of a minute that measures nothing."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = os.environ.get("SPARK_FAST_BENCH") == "tiny"
ALLOCATOR = os.environ.get("SPARK_FAST_BENCH_ALLOCATOR", "kept")  # "kept" or "default"

MASK_RATIO = 0.6
BATCH = 1 if TINY else 8
SIZE = 128 if TINY else 224  # pixels of an image
PATCH = 32  # pixels of a mask patch
GRID = (SIZE // PATCH, SIZE // PATCH)

# A case lasts about this many seconds, within these bounds on the number of rounds.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.4, 7, 21
SAMPLE = 0.002  # seconds; a faster op is repeated within one sample
HEADLINE_ROUNDS = 1 if TINY else 7 if ALLOCATOR == "kept" else 3
NET_ROUNDS = 1 if TINY else 5
SWEEP_ROUNDS = 1 if TINY else 3

if ALLOCATOR not in ("kept", "default"):
    raise ValueError(f"SPARK_FAST_BENCH_ALLOCATOR must be 'kept' or 'default'; got {ALLOCATOR!r}")
