"""keep_memory: the process keeps what it frees. In a process of its own, since it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import psutil, torch
import spark_fast as sf

def resident():
    return psutil.Process().memory_info().rss / 2**20

def after_a_large_tensor():
    before = resident()
    torch.ones(64 * 2**20)  # 256 MiB
    return resident() - before

assert after_a_large_tensor() < 64, "the system had it back"
assert sf.keep_memory()
assert after_a_large_tensor() > 192, "the process kept it"
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_stays():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
