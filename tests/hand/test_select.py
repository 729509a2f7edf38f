"""DSIR and Gumbel top-k by hand: counts, weights, draws."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.core.errors import UserError
from laconic.core.menu import Budget, Cost, Damage, Menu, Row
from laconic.core.score import Unit
from laconic.core.site import Examples, Site, TensorId
from laconic.core.statistic import Total
from laconic.kernels.ngrams import kl_of_counts, ngram_counts, words
from laconic.methods.search.allocate.knapsack import Knapsack
from laconic.methods.search.sample.gumbel import Gumbel
from laconic.methods.select.score.dsir import DSIR


def test_words_and_their_pairs_are_counted():
    assert words("Don't PANIC, x_1 == 2!") == ["don", "'", "t", "panic", ",", "x_1", "==", "2", "!"]
    counts = ngram_counts(["a b a b", "", "b"], buckets=1000, order=2)
    # a, b, a, b and "a b", "b a", "a b"
    assert counts.sum(1).tolist() == [7.0, 0.0, 1.0]
    assert sorted(counts[0][counts[0] > 0].tolist()) == [1.0, 2.0, 2.0, 2.0]
    # the place of a word is the same in every text; CRC-32 of "b" is 1908338681
    assert counts[2, 1908338681 % 1000] == 1


def test_weights_by_hand():
    # target: shares 3/4 and 1/4 and none of the third; pool: 1/4, 1/4, 1/2
    stats = {Total("target"): torch.tensor([3.0, 1.0, 0.0]), Total("pool"): torch.tensor([2.0, 2.0, 4.0])}
    counts = torch.tensor([[1.0, 0, 0], [2, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    site = Site("pool", Examples(), {"weight": TensorId("pool")}, (5, 3))
    found = DSIR()(Unit(site, counts), stats)
    third = math.log(1e-8) - math.log(0.5 + 1e-8)
    torch.testing.assert_close(found, torch.tensor([math.log(3), 2 * math.log(3), 0, third, 0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    # KL(target || pool) = 3/4 log 3
    assert kl_of_counts(stats[Total("target")], stats[Total("pool")], 1e-12) == pytest.approx(0.75 * math.log(3), abs=1e-6)


def menu(values: list[float], sizes: list[int] | None = None) -> Menu:
    rows = []
    for i, value in enumerate(values):
        covers = frozenset({str(i)})
        rows.append(Row(covers, "leave", {}, Cost(0), Damage(0.0, "nats", "pool")))
        rows.append(Row(covers, "take", {}, Cost(sizes[i] if sizes else 1, examples=1), Damage(-value, "nats", "pool")))
    return Menu(tuple(rows))


def taken(search, m: Menu, budget: Budget, seed: int = 0) -> set[str]:
    plan = search(m, budget, judge=None, rng=torch.Generator().manual_seed(seed), log=lambda _: None)
    return {next(iter(row.covers)) for row in plan.rows if row.method == "take"}


def test_top_k_is_what_is_left_without_noise():
    m = menu([0.5, 3.0, -1.0, 2.0, 2.5])
    assert taken(Gumbel(0), m, Budget(examples=2)) == {"1", "4"} == taken(Knapsack(), m, Budget(examples=2))
    # all that fits, by worth: 3 of size 5, then what still fits beside it
    sized = menu([1.0, 3.0, 2.0], [4, 5, 6])
    assert taken(Gumbel(0), sized, Budget(bytes=9)) == {"1", "0"}
    assert taken(Gumbel(0), sized, Budget(bytes=9, examples=1)) == {"1"}
    # nothing fits: all are left, which is a cover
    assert taken(Gumbel(0), sized, Budget(bytes=3)) == set()


def test_draws_follow_the_weights():
    # exp(worth) = 1, 2, 3, 4: one is drawn with chances 0.1, 0.2, 0.3, 0.4
    m = menu([math.log(v) for v in (1, 2, 3, 4)])
    count = [0] * 4
    for seed in range(2000):
        (one,) = taken(Gumbel(), m, Budget(examples=1), seed)
        count[int(one)] += 1
    # three standard deviations of a share of 0.4 over 2,000 draws are 0.033
    assert [share / 2000 for share in count] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.033)
    assert taken(Gumbel(), m, Budget(examples=2), 5) == taken(Gumbel(), m, Budget(examples=2), 5)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="below 0"):
        Gumbel(-1)
    bound = menu([1.0])
    with pytest.raises(ValueError, match="one by one"):
        taken(Gumbel(), Menu((bound.rows[0], bound.rows[1]._replace(requires=(0,)))), Budget(examples=1))
    dear = Menu((bound.rows[1],))
    with pytest.raises(UserError, match="below what is possible"):
        taken(Gumbel(), dear, Budget(bytes=0))
