"""Gradual pruning by hand: how many weights are gone after how many steps, and which."""

from __future__ import annotations

import pytest
import torch

from laconic.core.packed import Dense, Transposed
from laconic.kernels.grids import Grid
from laconic.methods.prune.cut.sparse import Sparse
from laconic.methods.prune.schedule.gradual import Going, Gradual, gone, greatest
from laconic.methods.quantize.grid.grouped import Grouped

W = torch.tensor([[1.0, -4.0, 2.0, 3.0], [8.0, 7.0, -6.0, 5.0]])


def held(mask: list[list[int]], weight: torch.Tensor = W) -> Sparse:
    there = torch.tensor(mask, dtype=torch.bool)
    return Sparse.of(tuple(weight.shape), there, Dense(Sparse.gather(weight, there).bfloat16()))


def test_shares_follow_a_cube() -> None:
    # half of the way: 1 - 1/8 of the end
    assert [gone(done, 0.8, 0.5) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.7, 0.8, 0.8])


def test_the_least_go_first() -> None:
    assert greatest(W, 2).int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
    # of equal ones the first stay
    assert greatest(torch.ones(1, 3), 2).int().tolist() == [[1, 1, 0]]
    soft = Going(held([[0, 1, 0, 1], [1, 1, 0, 0]]), W, 1.0)
    assert soft.even and torch.equal(soft.dense(), W)
    # half of the way 7/8 of a half of 4 are gone, 1.75, so 2
    assert soft.penalty(0.5) is None
    assert soft.dense().tolist() == [[0.0, -4.0, 0.0, 3.0], [8.0, 7.0, 0.0, 0.0]]
    # what has gone may come back while others shrink
    with torch.no_grad():
        soft.weight[0] = torch.tensor([9.0, -4.0, 2.0, 3.0])
    assert soft.dense()[0].tolist() == [9.0, -4.0, 0.0, 0.0]
    assert soft.harden().dense()[0].tolist() == [9.0, -4.0, 0.0, 0.0]


def test_rows_that_have_unlike_many_share_one_count() -> None:
    form = held([[0, 1, 0, 0], [1, 1, 0, 0]])
    soft = Going(form, W, 0.5)
    assert not soft.even and soft.keep == 3
    # until something was learned it is what is held
    assert torch.equal(soft.harden().dense(), form.dense()) and soft.harden().nbytes == form.nbytes
    soft.penalty(0.9)
    assert soft.dense().tolist() == [[0.0] * 4, [8.0, 7.0, -6.0, 0.0]]
    assert torch.equal(soft.harden().dense(), soft.dense().detach()) and soft.harden().nbytes == form.nbytes


def test_what_learns_how() -> None:
    lesson = Gradual()
    form = held([[0, 1, 0, 1], [1, 1, 0, 0]])
    assert isinstance(lesson.soften(form, W), Going)
    codes = Grouped.of((2, 4), Grid(4, None), torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1))
    assert not isinstance(lesson.soften(codes, W), Going)
    assert lesson.soften(Transposed(form), W.T) is None
    with pytest.raises(ValueError, match="until"):
        Gradual(until=0.0)
    # only what is there gets a gradient
    soft = Going(form, W, 1.0)
    soft.penalty(1.0)
    soft.dense().sum().backward()
    assert soft.weight.grad.int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
