"""Freed tensors leave the process at once, and a cache that grows does not leave holes behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from laconic.kernels.memory import LARGE, give_back, trim

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


GROWS = """
import torch, laconic.runtime
from transformers import LlamaConfig, LlamaForCausalLM
from laconic.measurement import peak_memory
from laconic.methods.cache.store.full import Full
if not {tidy}:
    laconic.runtime.trim = lambda: None
torch.set_num_threads(1)
shape = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=12, max_position_embeddings=8192, **shape)).eval()
cache, before = laconic.runtime.StateCache(model, Full()), peak_memory()
with torch.inference_mode():
    for _ in range(32):
        model.model(torch.zeros(1, 256, dtype=torch.int64), past_key_values=cache)
print((peak_memory() - before) / cache.nbytes)
"""


@pytest.mark.long
@pytest.mark.skipif(not trim(), reason="this C library has no such call")
def test_a_cache_that_grows_leaves_no_holes() -> None:
    """A prompt of 8,192 tokens in pieces, in multiples of what the cache holds at the end."""
    found = {}
    for tidy in (False, True):
        done = subprocess.run([sys.executable, "-c", GROWS.format(tidy=tidy)], capture_output=True, text=True, check=True)
        found[tidy] = float(done.stdout)
    assert found[True] < 4
    assert found[True] < 0.7 * found[False]
