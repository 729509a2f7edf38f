"""MixDQ by hand: a first token kept out of the range, structure and noise of images, and a budget split between two groups."""

from __future__ import annotations

import pytest
import torch

from laconic.core.errors import UserError
from laconic.core.menu import Budget, Cost, Damage, Judges, Menu, Row, cheapest
from laconic.core.packed import restore
from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Extremes, Opening, Seen
from laconic.kernels.densities import densities, means
from laconic.kernels.grids import Grid
from laconic.kernels.losses import Dissimilarity, NoiseToSignal
from laconic.kernels.ranges import Beyond
from laconic.methods.quantize.round.mixdq import MixDQ, OneRange, stand_in, still
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.search.allocate.knapsack import Knapsack
from laconic.methods.search.allocate.uniform import Uniform
from laconic.methods.search.decouple.mixdq import MixDQ as Bits
from laconic.methods.search.decouple.mixdq import split_at


def site(n, m, **context):
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m), context=context)


def seen_by(statistic, where, x, sequences, mask=None):
    return statistic.finish(statistic.update(statistic.init(where), Seen(x=x, sequences=sequences, mask=mask)))


# ---- the first token


def test_how_far_a_first_token_goes():
    """Two sequences of two: first rows (1, -2) and (5, 0), so 4 up and down in one channel and 2 in the other; second rows do not count."""
    x = torch.tensor([[1.0, -2], [3, 40], [5, 0], [-70, 1]])
    assert seen_by(Opening(), site(3, 2, positions=2), x, 2).tolist() == [[1, -2], [5, 0]]
    assert seen_by(Opening(), site(3, 2, positions=2), x, 2, torch.tensor([True, True, False, True])).tolist() == [[1, -2]] * 2
    # another length, or nothing known of positions: nothing is told
    assert seen_by(Opening(), site(3, 2, positions=2), x, 1).tolist() == [[0, 0]] * 2
    assert seen_by(Opening(), site(3, 2), x, 2).tolist() == [[0, 0]] * 2
    two = Opening()
    where = site(3, 2, positions=2)
    halves = [two.update(two.init(where), Seen(x=part, sequences=1)) for part in x.split(2)]
    assert two.finish(two.merge(*halves)).tolist() == [[1, -2], [5, 0]]
    ends = torch.tensor([[-3.0, -20], [5, 1]])
    assert still(torch.tensor([[1.0, 2], [1.0001, 2]]), ends) and not still(torch.tensor([[1.0, 2], [1.01, 2]]), ends)


def test_only_what_comes_after_the_first_is_rounded():
    steps = Beyond(2, torch.tensor([5.5, 0.3]), torch.tensor([1.0]), torch.tensor([1.0]))
    # codes 0 to 3 are -1 to 2; what stands for the first takes its place
    found = steps(torch.tensor([[[800.3, -9.0], [0.6, 9.0], [-9.0, 0.4]]]))
    torch.testing.assert_close(found, torch.tensor([[[5.5, 0.3], [1.0, 2.0], [-1.0, 0.0]]]))
    assert Beyond(2, None, steps.scale, steps.zero)(torch.tensor([800.3, 0.6])).tolist() == [2.0, 1.0]


def test_what_stands_for_the_first_gives_its_product():
    """diag(1, 2) rounded to diag(1, 2.5): (3, 5) gives (3, 10), and so does (3, 4). Of a wide matrix it is the shortest of many."""
    standing = stand_in(torch.diag(torch.tensor([1.0, 2.5])), torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(standing, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(stand_in(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([9.0, -1.0])), torch.tensor([4.0, 4.0]))
    # what a matrix does not read needs nothing to stand for it
    assert stand_in(torch.tensor([[1.0, 1e-9]]), torch.tensor([[1.0, 0.0]]), torch.tensor([2.0, 800.0])).tolist() == pytest.approx(
        [2, 0], abs=1e-6
    )


def loud(sequences: int, t: int, m: int) -> torch.Tensor:
    """Sequences whose first token is the same and very large."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sequences, t, m, generator=g)
    x[:, 0] = 0
    x[:, 0, 3] = 800
    return x


def test_a_loud_first_token_costs_the_words_nothing():
    x, where = loud(16, 5, 8), site(6, 8, positions=5, outside=True)
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    stats = {statistic: seen_by(statistic, where, x.reshape(-1, 8), 16) for statistic in (Extremes(), Opening())}
    errors = {}
    for aware in (True, False):
        form = MixDQ(RTN(), aware)(where, {"weight": w}, stats, OneRange(Grid(8, None), 8)).hold[TensorId("a.weight")]
        dense = form.dense()
        errors[aware] = (form.matmul(x) - x @ dense.T)[:, 1:].square().mean()
        again = restore(form.describe(), form.tensors())
        assert torch.equal(again.matmul(x), form.matmul(x)) and form.apart is aware
        assert form.nbytes == MixDQ(RTN(), aware).stored(where, OneRange(Grid(8, None), 8))
    # 3 bits hold the first's column roughly, and its product is what the weights give all the same
    rough = MixDQ(RTN())(where, {"weight": w}, stats, OneRange(Grid(3, None), 8)).hold[TensorId("a.weight")]
    torch.testing.assert_close(rough.matmul(x)[:, 0], x[:, 0] @ w.T, rtol=2e-2, atol=1.0)
    assert float((x[:, 0] @ rough.dense().T - x[:, 0] @ w.T).abs().max()) > 10
    # words of -4 to 4 have steps of 0.03, or one of 3
    assert errors[True] < 1e-3 * errors[False]


def test_a_first_token_that_changes_is_rounded_with_the_others():
    x, where = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0)), site(6, 8, positions=5, outside=True)
    stats = {statistic: seen_by(statistic, where, x.reshape(-1, 8), 16) for statistic in (Extremes(), Opening())}
    form = MixDQ(RTN())(where, {"weight": torch.eye(6, 8)}, stats, OneRange(Grid(8, None), 8)).hold[TensorId("a.weight")]
    assert not form.apart and float(form.scale) == pytest.approx(float((x.max() - x.min()) / 255))


def test_what_does_not_come_from_outside_is_rounded_as_a_whole():
    x, where = loud(16, 5, 8), site(6, 8, positions=5)
    stats = {statistic: seen_by(statistic, where, x.reshape(-1, 8), 16) for statistic in (Extremes(), Opening())}
    form = MixDQ(RTN())(where, {"weight": torch.eye(6, 8)}, stats, OneRange(Grid(8, None), 8)).hold[TensorId("a.weight")]
    assert form.standing is None and not form.apart and form.nbytes == MixDQ(RTN()).stored(where, OneRange(Grid(8, None), 8))


def test_a_range_has_two_to_eight_bits():
    with pytest.raises(ValueError, match="2 to 8 bits"):
        OneRange(Grid(4, None), 9)


# ---- measures


def test_numbers_and_their_densities():
    x = torch.tensor([[-1.0, 0.0, 0.25]])
    torch.testing.assert_close(means(densities(x)), x)
    torch.testing.assert_close(means(densities(x).log_softmax(-1)), x)


def test_noise_beside_signal_in_decibels():
    wanted = torch.tensor([[1.0, -1, 1, -1], [2, 2, 2, 2]])
    given = wanted + torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.02, 0.02, 0.02, 0.02]])
    # energies 0.04 of 4, and 0.0016 of 16: -20 and -40
    assert float(NoiseToSignal()(densities(given), densities(wanted), None)) == pytest.approx(-30, abs=1e-2)
    assert float(NoiseToSignal()(densities(wanted), densities(wanted), None)) < -300


def test_structure_of_images():
    g = torch.Generator().manual_seed(0)
    image = 0.4 + 0.3 * (torch.rand(3, 144, generator=g) * 2 - 1)
    apart = Dissimilarity()
    assert float(apart(densities(image), densities(image), None)) == pytest.approx(0, abs=1e-4)
    # a constant more changes brightness alone; an image turned about has no structure in common
    brighter, inverted = (float(apart(densities(other), densities(image), None)) for other in (image + 0.1, 0.8 - image))
    assert 0 < brighter < 0.5 < 1 < inverted <= 2
    # flat images: only the term of brightness is left, (2ab + c) / (a^2 + b^2 + c) with c = 0.0004
    flat = float(apart(densities(torch.full((1, 144), 0.5)), densities(torch.full((1, 144), 0.1)), None))
    assert flat == pytest.approx(1 - (0.1 + 0.0004) / (0.26 + 0.0004), abs=1e-3)
    with pytest.raises(UserError, match="square images"):
        apart(torch.zeros(2, 7, 16), torch.zeros(2, 7, 16), None)


# ---- bits


def ladder(name: str, damages: dict[int, float], weights: int = 80) -> tuple[Row, ...]:
    return tuple(
        Row(frozenset({name}), "m", {"bits": bits}, Cost(bits * weights // 8), Damage(value, "nats", "sums"), name, weights)
        for bits, value in damages.items()
    )


class Two(Judges):
    """KL, structure and noise of whole plans, each a sum over its rows; asked keeps which of them was asked for."""

    rows = 2

    def __init__(self, tables, objective="KL", asked=None):
        self.tables, self.objective, self.asked = tables, objective, [] if asked is None else asked

    def by(self, objective):
        return Two(self.tables, objective.name, self.asked)

    def __call__(self, plans, part=None):
        self.asked.append((self.objective, len(plans)))
        table = self.tables[self.objective]
        return [Damage(sum(table[row.site][row.level["bits"]] for row in plan.rows), self.objective, "output") for plan in plans]


def test_each_group_is_bought_by_its_own_measure():
    """cross.a suffers in structure at 4 bits and cross.b not at all, conv.c in noise and conv.d not; what the menu says of them is the
    opposite, and each group can pay for one of its two at 8 bits."""
    fine, rough = {4: 0.0, 8: 0.0}, {4: 1.0, 8: 0.0}
    names = ("x.cross.a", "x.cross.b", "conv.c", "conv.d")
    menu = Menu(tuple(row for name, told in zip(names, (fine, rough, fine, rough), strict=True) for row in ladder(name, told)))
    tables = {
        "KL": dict.fromkeys(names, rough),
        "structural dissimilarity": dict(zip(names, ({4: 0.5, 8: 0.1}, {4: 0.1, 8: 0.1}, {}, {}), strict=True)),
        "noise to signal": dict(zip(names, ({}, {}, {4: -20.0, 8: -50.0}, {4: -50.0, 8: -50.0}), strict=True)),
    }
    for table in tables.values():
        for name in names:
            # what is not changed counts for nothing
            table[name] = {4: 0.0, 8: 0.0} | table[name]
    judge = Two(tables)
    search = Bits(Uniform(), Knapsack(), ratios=(1.0, 1.0, 1))
    plan = search(menu, Budget(2 * 40 + 2 * 80), judge=judge, rng=torch.Generator(), log=lambda _: None)
    assert {row.site: row.level["bits"] for row in plan.rows} == {"x.cross.a": 8, "x.cross.b": 4, "conv.c": 8, "conv.d": 4}
    assert judge.asked == [("structural dissimilarity", 4), ("noise to signal", 4), ("KL", 2)]


def test_a_split_is_of_bits_and_stays_where_both_can_pay():
    # weights 1 to 3, twice the bits: 2 shares of 5
    assert split_at(500, (100, 300), 2.0) == 200 and split_at(500, (100, 100), 1.0) == 250
    names = ("ff.a", "conv.b")
    menu = Menu(tuple(row for name in names for row in ladder(name, {2: 1.0, 8: 0.0})))
    tables = {key: {name: {2: 1.0, 8: 0.0} for name in names} for key in ("KL", "structural dissimilarity", "noise to signal")}
    bits = Bits(Uniform(), Knapsack(), ratios=(0.01, 100.0, 2))
    for size in (cheapest(menu), 100, 160):
        plan = bits(menu, Budget(size), judge=Two(tables), rng=torch.Generator(), log=lambda _: None)
        assert plan.bytes == {40: 40, 100: 100, 160: 160}[size]
    with pytest.raises(UserError, match="40"):
        bits(menu, Budget(39), judge=Two(tables), rng=torch.Generator(), log=lambda _: None)


def test_wrong_knobs_are_refused():
    with pytest.raises(ValueError, match="ratios"):
        Bits(Uniform(), Knapsack(), ratios=(2.0, 1.0, 3))
    with pytest.raises(ValueError, match="regular expression"):
        Bits(Uniform(), Knapsack(), content="(")
