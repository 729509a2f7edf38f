"""FinerCut worked by hand: distances of two distributions, what is left to cut, and a greedy order that one ranking misses."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.core.errors import UserError
from laconic.core.menu import Budget, Cost, Damage, Judge, Menu, Row, cheapest, plan_of
from laconic.core.site import Site, Sublayer, TensorId
from laconic.kernels.losses import Angular, Euclidean, JensenShannon
from laconic.methods.prune.cut.sublayer import DropSublayer, Gone, Passed, Skipped
from laconic.methods.prune.schedule.finercut import FinerCut, cuts, dearest


def test_distances_of_two_predictions():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    # the mean is (0.7, 0.3): half of 0.5 ln(5/7) + 0.5 ln(5/3) = 0.08718, and half of 0.9 ln(9/7) + 0.1 ln(1/3) = 0.11632
    assert float(JensenShannon()(q.log(), p.log(), None)) == pytest.approx(0.101749, abs=2e-6)
    assert float(JensenShannon()(p.log(), q.log(), None)) == pytest.approx(0.101749, abs=2e-6)
    # as far apart as can be: ln 2
    far = torch.tensor([[40.0, -40.0]])
    assert float(JensenShannon()(far, -far, None)) == pytest.approx(math.log(2), abs=1e-6)
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    # a right angle is half of a half turn; 3, 4, 5
    assert float(Angular()(a, b, None)) == pytest.approx(0.5)
    assert float(Angular()(a, 2 * a, None)) == pytest.approx(0.0, abs=1e-6)
    assert float(Euclidean()(a, b, None)) == pytest.approx(5.0)
    # a prediction that does not count
    mask = torch.tensor([True, False])
    both = torch.cat([a, a]), torch.cat([b, a])
    assert float(Euclidean()(*both, mask)) == pytest.approx(5.0)


def row(site: str, tensors: str, size: int, method: str = "kept", level: dict | None = None) -> Row:
    return Row(frozenset(tensors.split()), method, level or {}, Cost(size), Damage(0.0, "nats/token", "here"), site)


def parts(**sizes: int) -> Menu:
    """Sub-layers of a matrix and a norm of one byte each."""
    rows = []
    for name, size in sizes.items():
        rows += [row("", f"{name}.w", size), row("", f"{name}.n", 1), row(name, f"{name}.w {name}.n", 0, "drop")]
    return Menu(tuple(rows), fixed=5)


class Told(Judge):
    """Distances by what is gone."""

    rows = 3

    def __init__(self, said: dict[str, float]) -> None:
        self.said, self.asked = said, []

    def __call__(self, plans, part=None):
        gone = ["".join(sorted(r.site for r in plan.rows if r.method == "drop")) for plan in plans]
        self.asked.append(gone)
        return [Damage(self.said[one], "nats/token", "the output") for one in gone]


# a and b do the same work: either may go, not both; c alone is dearer than either
SAID = {"a": 0.10, "b": 0.11, "c": 0.20, "ab": 0.90, "ac": 0.25, "bc": 0.26, "abc": 1.0}


def cut(menu: Menu, bytes: int, judge: Judge, **knobs):
    return FinerCut(**knobs)(menu, Budget(bytes), judge=judge, rng=torch.Generator().manual_seed(0), log=lambda _: None)


def test_it_looks_again_after_each_cut():
    menu, judge = parts(a=10, b=10, c=10), Told(SAID)
    # 38 bytes in all; 16 leave room for one sub-layer, so two go: a, then c, where one ranking would say a and b
    plan = cut(menu, 16, judge)
    assert plan.bytes == 16
    assert [r.site for r in plan.rows if r.method == "drop"] == ["a", "c"]
    assert judge.asked == [["a", "b", "c"], ["ab", "ac"]]
    assert plan == plan_of(menu, plan.rows)
    # nothing has to go, nothing is asked
    judge = Told(SAID)
    assert cut(menu, 38, judge).bytes == 38
    assert judge.asked == []
    # all may go, and below that nothing can
    assert cut(menu, 5, Told(SAID)).bytes == 5 == cheapest(menu)
    with pytest.raises(UserError, match="least is 5 bytes"):
        cut(menu, 4, Told(SAID))


def test_what_may_go_in_one_round():
    menu = parts(a=10, b=20)
    held = dearest(menu)
    assert [r.covers for r in held] == [{"b.w"}, {"a.w"}, {"a.n"}, {"b.n"}]
    first = cuts(menu, held)
    assert [[r.site for r in rows if r.site] for rows in first] == [["a"], ["b"]]
    (second,) = cuts(menu, first[0])
    assert [r.site for r in second] == ["a", "b"]
    assert cuts(menu, second) == []
    # of a ladder the next step, and a set that is gone is not brought back in parts
    steps = Menu((row("a", "a.w", 4, "m", {"bits": 4}), row("a", "a.w", 3, "m", {"bits": 3}), row("a", "a.w", 2, "m", {"bits": 2})))
    ((next_one,),) = cuts(steps, dearest(steps))
    assert next_one.level == {"bits": 3}


def test_the_least_of_nested_sets():
    menu = parts(a=10, b=20)
    assert cheapest(menu) == 5
    # a sub-layer whose parts are cheaper than the whole, and one whose parts do not cover it
    rows = (row("", "x", 3), row("", "y", 4), row("xy", "x y", 9), row("", "u", 1), row("uv", "u v", 6))
    assert cheapest(Menu(rows)) == 3 + 4 + 6
    with pytest.raises(ValueError, match="not nested"):
        cheapest(Menu((row("", "x y", 1), row("", "y z", 1))))


def test_what_stands_in_its_place():
    site = Site(
        "l.0.attn", Sublayer(), {"q": TensorId("q"), "n": TensorId("n")}, (5,), {"part": "attention"},
        {"layer": 0, "norms": ("l.0.norm",), "writers": ("l.0.attn.o",), "outputs": 2},
    )  # fmt: skip
    change = DropSublayer()(site, {"q": torch.ones(2, 2), "n": torch.ones(1)}, {}, Gone())
    assert {tensor.name: (form.nbytes, form.dense().tolist()) for tensor, form in change.hold.items()} == {
        "q": (0, [[0.0, 0.0], [0.0, 0.0]]),
        "n": (0, [0.0]),
    }
    assert {path: type(part) for path, part in change.place.items()} == {"l.0.norm": Passed, "l.0.attn": Skipped}

    seen = []

    class Cache:
        def get_seq_length(self):
            return 0

        def update(self, keys, values, layer):
            seen.append((tuple(keys.shape), tuple(values.shape), layer))

    x = torch.randn(2, 3, 4)
    out, weights = change.place["l.0.attn"](hidden_states=x, past_key_values=Cache(), position_embeddings=None)
    assert torch.equal(out, torch.zeros(2, 3, 4)) and weights is None
    assert seen == [((2, 1, 3, 0), (2, 1, 3, 0), 0)]
    assert torch.equal(Skipped(0, None)(x), torch.zeros(2, 3, 4))
    assert Passed()(x) is x
