"""LeanAttention on cases small enough to work out by hand; expected numbers are literal."""

from __future__ import annotations

import math

import torch

from laconic.kernels.attention import Plain, held_attention
from laconic.methods.attention.exact.lean import Lean


def test_shares_by_hand():
    # 3 + 1 + 4 tiles over 3 workers: the line is cut behind tiles 2, 5 and 8
    assert Lean()([3, 1, 4], 3) == [(0, 0, 0, 2), (1, 0, 2, 3), (1, 1, 0, 1), (1, 2, 0, 1), (2, 2, 1, 4)]
    # 2 tiles over 4 workers: behind 0, 1, 1 and 2; pairs without any have no run
    assert Lean()([0, 2, 0], 4) == [(1, 1, 0, 1), (3, 1, 1, 2)]
    assert Lean()([], 2) == []


def test_two_runs_are_joined_by_hand():
    # 128 tokens of score 0 and value 0, then one of score ln 128 and value 1: half of the weight each
    keys, values = torch.zeros(1, 1, 129, 1), torch.zeros(1, 1, 129, 1)
    keys[..., 128, 0], values[..., 128, 0] = math.log(128), 1.0
    before = torch.get_num_threads()
    try:
        # two tiles of 128 tokens at most, one for each worker
        torch.set_num_threads(2)
        out = held_attention(torch.ones(1, 1, 1, 1), [Plain((keys,), (129,))], [Plain((values,), (129,))], schedule=Lean())
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5]))
