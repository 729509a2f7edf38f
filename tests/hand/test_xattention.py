"""XAttention by hand: antidiagonals, shares of blocks, and which blocks stay."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.methods.attention.sparse.xattention import XAttention, antidiagonal, grouped


def test_a_product_of_groups_is_the_sum_of_an_antidiagonal() -> None:
    query, key = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    # q1 k0 + q0 k1, the antidiagonal of the 2 x 2 tile
    assert grouped(query, 2, True) @ grouped(key, 2, False).T == 2 * 3 + 1 * 5
    # a group that is not full has zeros behind its end
    assert grouped(torch.tensor([[1.0], [2.0], [3.0]]), 2, True).tolist() == [[2.0, 1.0], [0.0, 3.0]]
    assert grouped(torch.tensor([[1.0], [2.0], [3.0]]), 2, False).tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_shares_of_blocks() -> None:
    # groups of one token, blocks of one: attention itself, causal; scores of the last row are log 1, log 3, 0
    query, key = torch.ones(3, 1), torch.tensor([[0.0], [math.log(3)], [0.0]])
    found = antidiagonal(query, key, 1, 1, 1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.2, 0.6, 0.2]]))
    # blocks of two groups: sums over both; the second block of queries has one group
    torch.testing.assert_close(antidiagonal(query, key, 1, 2, 1.0), torch.tensor([[2.0, 0.0], [0.8, 0.2]]))
    # groups of two tokens: antidiagonals of q = 1 1 1 (and a zero behind), over sqrt(d) S = 2: scores log 3 / 2, and for the last
    # group log 3 / 2 (q2 k1) and 0 (q2 behind the end meets k2)
    found = antidiagonal(query, key, 2, 2, 1.0)
    third = math.exp(math.log(3) / 2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [third / (third + 1), 1 / (third + 1)]]))


def test_which_blocks_stay() -> None:
    query, key = torch.ones(1, 1, 4, 1), torch.tensor([0.0, math.log(6), 0.0, 0.0]).reshape(1, 1, 4, 1)
    pattern = XAttention(tau=0.6, stride=1, block=1)
    # the last row has shares 1/9, 6/9, 1/9, 1/9: the second reaches 0.6, the first and its own stay besides
    assert pattern(query, key)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert XAttention(tau=0.6, stride=1, block=1, sink=False)(query, key)[0, 0, 3].int().tolist() == [0, 1, 0, 1]
    # two queries with two tokens behind them
    assert torch.equal(pattern(query[:, :, 2:], key), pattern(query, key)[:, :, 2:])


def test_knobs_that_make_no_sense() -> None:
    for wrong in ({"tau": 0.0}, {"tau": 1.1}, {"stride": 3}, {"stride": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            XAttention(**wrong)
