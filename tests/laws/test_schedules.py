"""The law of Schedule, run over every one that is found in the tree: each tile is computed once, whoever does it."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from laconic.core.state import Schedule
from laconic.kernels.attention import Plain, attention, held_attention

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)

SCHEDULES = [(path, found.instance(cls)) for path, cls in found.classes(Schedule)]
each = pytest.mark.parametrize("schedule", [schedule for _, schedule in SCHEDULES], ids=[path for path, _ in SCHEDULES])


def test_every_schedule_is_found():
    assert {"attention.exact.lean"} <= {path for path, _ in SCHEDULES}


@each
def test_every_tile_is_computed_once(schedule):
    for tiles, workers in itertools.product(([7], [5, 5, 5], [1, 100, 3], [64] * 8, [0, 2, 0], [0], []), (1, 2, 3, 5, 50)):
        runs = schedule(tiles, workers)
        assert all(0 <= run.worker < workers and run.first < run.last for run in runs)
        assert len({(run.worker, run.pair) for run in runs}) == len(runs)
        for pair, count in enumerate(tiles):
            assert [at for run in runs if run.pair == pair for at in range(run.first, run.last)] == list(range(count))


@each
def test_attention_is_that_of_dense_tensors(schedule):
    draw = torch.Generator().manual_seed(0)
    keys, values = (Plain((torch.randn(3, 2, 700, 24, generator=draw),), (700, 3, 260)) for _ in range(2))
    query, before = torch.randn(3, 4, 1, 24, generator=draw), torch.get_num_threads()
    plain = attention(query, keys.pages[0], values.pages[0], keys.lengths)
    try:
        for workers in (1, 2, 5):
            torch.set_num_threads(workers)
            torch.testing.assert_close(held_attention(query, [keys], [values], schedule=schedule), plain, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)
