"""Matryoshka embeddings, worked by hand: neighbourhoods, nested sizes learned in one step, cascades, funnels and recall."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.budget import Floor, bytes_of, vector_budget
from laconic.core.errors import UserError
from laconic.core.packed import Joined
from laconic.kernels.losses import Neighbours, SquaredError
from laconic.kernels.retrieval import cascade, funnel, nearest, overlap
from laconic.methods.nest.vector.mrl import MRL
from laconic.tuning import tune
from laconic.vectors import Curve, halves, most_of, parted, rotation


def test_nested_sizes_are_halves() -> None:
    assert halves(64) == (8, 16, 32, 64)
    assert halves(300) == (9, 18, 37, 75, 150, 300)
    assert halves(5) == (5,)


def test_every_size_learns_in_each_step() -> None:
    """z = W x with W (3, 1) zero in slices of 1 and 2, x = 1, target 1 each. Squared error sum (z - 1)^2: gradients -2 from the first
    prefix for row 0, -2 from the second for rows 0, 1, 2: row 0 has twice that of the others."""
    lesson = MRL(objective=SquaredError(), rates=(("weight", 0.1),), steps=1, optimiser="signed", decay="constant")
    soft = lesson.soften(Joined.of(torch.zeros(3, 1), [1, 2], 0), torch.zeros(3, 1))
    assert soft is not None
    assert list(lesson.prefixes(2, torch.Generator())) == [1, 2]
    seen = []

    def run(i, weights):
        seen.append(tuple(weights["w"].shape))
        out = torch.ones(1, 1) @ weights["w"].T
        return torch.cat([out, torch.ones(1, 3 - out.shape[1])], 1)

    tune(run, [torch.ones(1, 3)], {"w": soft}, lesson, generator=torch.Generator().manual_seed(0))
    assert seen == [(1, 1), (3, 1)]
    gradients = [p.grad.flatten().tolist() for p in soft.parameters() if p.grad is not None]
    assert gradients == [[-4.0], [-2.0, -2.0]]
    assert [round(v, 4) for v in soft.dense().detach().flatten().tolist()] == [0.1, 0.1, 0.1]


def test_neighbourhoods() -> None:
    """Three vectors at 0, 90 and 180 degrees: cosines 0 and -1 of the first, temperature 1: softmax (0, -1) against itself is 0; against
    equal cosines (all vectors the same) it is the KL to (1/2, 1/2)."""
    target = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    loss = Neighbours(temperature=1.0)
    assert float(loss(target * 3, target, None)) == pytest.approx(0, abs=1e-6)
    p = 1 / (1 + math.exp(-1))
    first = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    # the second sees cosines 0 and 0, the third as the first
    assert float(loss(torch.ones(3, 1), target, None)) == pytest.approx(2 * first / 3, abs=1e-6)
    assert float(loss(torch.ones(4, 1), torch.cat([target, torch.ones(1, 2)]), torch.tensor([True, True, True, False]))) == pytest.approx(
        2 * first / 3, abs=1e-6
    )
    # vectors of nothing make no NaN
    assert torch.isfinite(loss(torch.zeros(3, 1), target, None))


def test_nearest_by_cosine_and_what_is_found_again() -> None:
    corpus = torch.tensor([[1.0, 0], [10, 1], [0, 1], [-1, 0]])
    assert nearest(torch.tensor([[2.0, 0]]), corpus, 2).tolist() == [[0, 1]]
    assert nearest(corpus[:1], corpus, 2, torch.tensor([0])).tolist() == [[1, 2]]
    found, wanted = torch.tensor([[0, 1, 2], [4, 5, 6]]), torch.tensor([[2, 3, 1], [7, 8, 9]])
    assert overlap(found, wanted).tolist() == pytest.approx([2 / 3, 0])


def test_a_funnel_ranks_its_shortlist_anew() -> None:
    """By the first number alone 0 and 1 are as near as can be and 2 is far; by both 1 is nearer than 0, and 2 was left out."""
    corpus = torch.tensor([[1.0, 3], [1, 1.5], [-0.01, 1]])
    query = torch.tensor([[0.5, 1.0]])
    assert funnel(query, corpus, [2], [1]).tolist() == [[1]]
    assert sorted(funnel(query, corpus, [1], [2])[0].tolist()) == [0, 1]
    assert funnel(query, corpus, [1, 2], [2, 2]).tolist() == [[1, 0]]
    # more than there are
    assert funnel(query, corpus, [1, 2], [9, 3]).shape == (1, 3)


def test_a_cascade_stops_where_it_is_sure() -> None:
    """ln 9 : 0 is 0.9 to 0.1. The first is sure at once, the second only with the second prefix, the third never."""
    nine = math.log(9)
    short = torch.tensor([[nine, 0], [0.1, 0], [0.1, 0]])
    middle = torch.tensor([[0, nine], [0, nine], [0, 0.2]])
    whole = torch.tensor([[0, nine], [nine, 0], [0, 0.3]])
    choice, used = cascade([short, middle, whole], [2, 4, 8], 0.85)
    assert (choice.tolist(), used.tolist()) == ([0, 1, 1], [2, 4, 8])
    assert cascade([short, middle, whole], [2, 4, 8], 1.1)[1].tolist() == [8, 8, 8]


def test_the_rotation_puts_energy_first_and_keeps_all_of_it() -> None:
    """The Gram is 2 alone, and ((8, -1), (-1, 0.25)), whose eigenvalues are (8.25 +- sqrt(7.75^2 + 4)) / 2."""
    x = torch.tensor([[0.0, 2, 0], [0, -2, 0.5], [1, 0, 0], [-1, 0, 0]])
    turned = x @ rotation(x).T
    assert [round(v, 3) for v in turned.square().sum(0).tolist()] == [8.127, 2.0, 0.123]
    torch.testing.assert_close(turned @ turned.T, x @ x.T)


def test_the_fewest_numbers_for_a_floor() -> None:
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(200, 16) * torch.linspace(3, 0.1, 16), dim=1)
    curve = Curve(table, table, parted(200, 0).search, 5)
    least = curve.least(0.8, 0)
    assert curve.ends(least, 0)[1] >= 0.8 > curve.ends(least - 1, 0)[1]
    assert float(curve.at(16).mean()) == 1.0 and curve.least(1.0, 0) <= 16
    parts = parted(200, 3)
    assert len(parts.learn) == 100 and not {*parts.learn.tolist()} & {*parts.search.tolist()} & {*parts.certify.tolist()}


def test_words_of_the_budget() -> None:
    assert vector_budget(["recall=0.95"], 1000) == Floor(0.95, None, None)
    assert vector_budget(["recall>=0.9", "size<=10%", "dims=7"], 1000) == Floor(0.9, 100, 7)
    for words, match in (
        (["recall=1.5"], "at most 1"),
        (["recall=x"], "no number"),
        (["recal=0.9"], "did you mean|write recall"),
        (["recall<=0.9"], "not understood"),
        (["dims=0"], "whole one above zero"),
        (["dims=4", "dims=5"], "contradicts"),
        (["size=101%"], "over 100 %"),
    ):
        with pytest.raises(UserError, match=match):
            vector_budget(words, 1000)
    with pytest.raises(UserError, match="is for a file of vectors"):
        bytes_of("recall=0.9", 10)
    # two bytes of each of 90 vectors and 10 columns of the projection a number
    assert most_of(Floor(bytes=1000), 90, 10) == 5 and most_of(Floor(bytes=10**9, dims=3), 90, 10) == 3
    with pytest.raises(UserError, match="the least is 200 bytes"):
        most_of(Floor(bytes=199), 90, 10)
    with pytest.raises(UserError, match="more than the vectors' 10"):
        most_of(Floor(dims=11), 90, 10)
