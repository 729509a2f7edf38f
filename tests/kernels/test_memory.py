"""Freed tensors leave the process at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from laconic.kernels.memory import LARGE, give_back

CHILD = """
import psutil, torch
from laconic.kernels.memory import LARGE, give_back
if {asked}:
    assert give_back()
me, size = psutil.Process(), LARGE + LARGE // 2
before = me.memory_info().rss
held = [torch.ones(size, dtype=torch.uint8) for _ in range(20)]
del held
print(round((me.memory_info().rss - before) / size))
"""


def left(asked: bool) -> int:
    # as glibc stands once it has seen such blocks come and go, and cannot take the top of its heap away
    worst = {"MALLOC_MMAP_THRESHOLD_": str(LARGE * 2), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    command = [sys.executable, "-c", CHILD.format(asked=asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | worst)
    return int(done.stdout)


@pytest.mark.skipif(not give_back(), reason="this C library has no such switch")
def test_freed_tensors_are_given_back() -> None:
    # all twenty of them, which without the switch stay
    assert left(False) == 20
    assert left(True) == 0
