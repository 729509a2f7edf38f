"""EvoPress worked by hand: what a switch pays, what is left over, and a menu whose sums mislead."""

from __future__ import annotations

import itertools

import pytest
import torch

from laconic.core.errors import UserError
from laconic.core.menu import Budget, Cost, Damage, Judge, Menu, Row, plan_of
from laconic.methods.search.allocate.knapsack import Knapsack
from laconic.methods.search.allocate.uniform import Uniform
from laconic.methods.search.evolve.evopress import EvoPress, ladders, opening, spent, switch


def ladder(name: str, *sizes: int) -> tuple[Row, ...]:
    """Levels of one unit by their bytes, each finer one predicted to lose half as much."""
    return tuple(
        Row(frozenset({name}), "m", {"bits": i + 2}, Cost(size), Damage(2.0**-i, "nats/token", "here"), name)
        for i, size in enumerate(sizes)
    )


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_switch_of_equal_cost_keeps_the_bytes():
    units = [ladder("a", 10, 20), ladder("b", 10, 20)]
    # b stands at the top, so a is raised, and b pays: 20 + 10 bytes before and after
    assert switch(units, (0, 1), 0, rng()) == (1, 0)


def test_what_one_cannot_pay_several_do_and_the_rest_is_left():
    units = [ladder("a", 10, 50), ladder("b", 8, 20), ladder("c", 5, 35)]
    # raising a costs 40; b gives back 12 and c 30, so both are lowered: 65 bytes become 63
    for seed in range(6):
        assert switch(units, (0, 1, 1), 0, rng(seed)) == (1, 0, 0)
    # with 28 bytes free, b alone pays the other 12, and so does c: one of them, never both
    assert {switch(units, (0, 1, 1), 28, rng(seed)) for seed in range(20)} == {(1, 0, 1), (1, 1, 0)}
    # with 40 free nothing pays
    assert switch(units, (0, 1, 1), 40, rng()) == (1, 1, 1)


def test_bytes_left_over_raise_others_but_not_what_has_just_paid():
    units = [ladder("a", 10, 12), ladder("b", 10, 20)]
    # raising a costs 2, b gives back 10; the 8 left would not bring b back, and it is not asked
    assert switch(units, (0, 1), 0, rng()) == (1, 0)
    # 25 bytes: two steps of ten, and the third does not fit; b's single step of 30 never does
    assert spent([ladder("a", 10, 20, 30, 40), ladder("b", 5, 35)], (0, 0), 25, rng()) == (2, 0)


def test_what_cannot_be_paid_is_not_bought():
    assert switch([ladder("a", 10, 20), ladder("b", 10, 12)], (0, 1), 0, rng()) == (0, 1)
    assert switch([ladder("a", 10, 20)], (1,), 0, rng()) == (1,)


def test_no_mutant_is_over_the_budget():
    units = tuple(ladder(name, *sizes) for name, sizes in {"a": (7, 19, 40), "b": (5, 6, 31), "c": (11, 12, 13), "d": (90, 200)}.items())
    menu = Menu(tuple(row for own in units for row in own), fixed=3)
    space, first = opening(Uniform(), menu, Budget(240), rng(), lambda _: None)
    # the coarsest level has 113 bytes; all levels together at the second would have 237
    assert space.bytes == 237 and first == (1, 1, 1, 1) and space.room(first) == 0
    levels = first
    for seed in range(300):
        levels = space.mutant(levels, 1 + seed % 3, rng(seed))
        assert space.room(levels) >= 0 and space.plan(levels).bytes == 240 - space.room(levels)


class Together(Judge):
    """a and b at their finest are worth nothing alone and all together; c is worth what the menu says. Exact on any row."""

    rows = 4

    def __call__(self, plans, part=None):
        return [Damage(self.value(*(row.level["bits"] for row in plan.rows)), "nats/token", "the output") for plan in plans]

    @staticmethod
    def value(a: int, b: int, c: int) -> float:
        return (0.0 if a == b == 4 else 1.0) + 0.01 * (a + b) + 0.1 * 2.0 ** (2 - c)


def test_it_finds_what_no_sum_can_say():
    predicted = {"a": 0.1, "b": 0.1, "c": 4.0}
    rows = [
        row._replace(damage=Damage(predicted[row.site] * 2.0 ** -row.level["bits"], "nats/token", "here"))
        for name in predicted
        for row in ladder(name, 20, 30, 40)
    ]
    menu, budget = Menu(tuple(rows), fixed=7), Budget(107)
    # sums send all bytes to c: 30 + 30 + 40 = 100
    solved = Knapsack()(menu, budget, judge=None, rng=rng(), log=lambda _: None)
    assert [row.level["bits"] for row in solved.rows] == [3, 3, 4]
    assert Together()([solved])[0].value == pytest.approx(1.0 + 0.06 + 0.025)
    # the optimum by looking at all 27: a and b at 4 bits, c at 2, in the same 100 bytes
    every = [p for p in itertools.product((2, 3, 4), repeat=3) if 10 * sum(p) <= 100]
    assert min(every, key=lambda p: Together.value(*p)) == (4, 4, 2)
    for seed in range(3):
        found = EvoPress(Uniform(), generations=6, offspring=8, survivors=(3, 1), rows=(1, 4))(
            menu, budget, judge=Together(), rng=rng(seed), log=lambda _: None
        )
        assert [row.level["bits"] for row in found.rows] == [4, 4, 2]
        assert found.bytes == 107
        assert Together()([found])[0].value == pytest.approx(0.18)


def test_one_feasible_plan_is_the_answer():
    units = [*ladder("a", 10, 20), *ladder("b", 11, 22)]
    menu, said = Menu(tuple(units)), []
    plan = EvoPress(Uniform())(menu, Budget(21), judge=Flat(), rng=rng(), log=said.append)
    assert plan == plan_of(menu, [units[0], units[2]])
    assert any("no level can be switched" in line for line in said)


class Flat(Judge):
    """Nothing matters."""

    rows = 1

    def __call__(self, plans, part=None):
        return [Damage(1.0, "nats/token", "the output") for _ in plans]


def test_what_it_cannot_switch_is_refused():
    a, b = ladder("a", 10, 20)
    both = a._replace(covers=frozenset({"a", "b"}))
    with pytest.raises(UserError, match="overlap"):
        ladders(Menu((a, b, both, *ladder("b", 1, 2))))
    with pytest.raises(UserError, match="require"):
        ladders(Menu((a._replace(requires=(1,)), b)))
    with pytest.raises(ValueError, match="last survivor"):
        EvoPress(Uniform(), survivors=(4, 2))
    with pytest.raises(ValueError, match="judge"):
        EvoPress(Uniform())(Menu((a, b)), Budget(30), judge=None, rng=rng(), log=lambda _: None)


def test_a_row_that_another_beats_is_no_level_unless_it_was_bought():
    a, b = ladder("a", 10, 20)
    worse = Row(a.covers, "other", {"bits": 9}, Cost(15), Damage(3.0, "nats/token", "here"), "a")
    assert ladders(Menu((b, worse, a))) == ((a, b),)
    assert ladders(Menu((b, worse, a)), [worse]) == ((a, worse, b),)
