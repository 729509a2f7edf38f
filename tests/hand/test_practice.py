"""The switches of learned rounding by hand, on a grid of step 1 with zero point 1 and codes 0 to 3."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from laconic.core.site import Linear, Site, TensorId
from laconic.kernels.grids import Grid
from laconic.kernels.levels import Levels
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.adaround import AdaRound
from laconic.methods.quantize.round.practice import SOFT, Practice
from laconic.methods.quantize.round.rtn import RTN
from laconic.tuning import tune

# wished at codes 0, 1.4, 1.6 and 3
W = torch.tensor([[-1.0, 0.4, 0.6, 2.0]])
TWO = Grid(2, None)
PLAIN = Practice(soft="straight", reach=2)


def held(weight: torch.Tensor, grid: Grid = TWO):
    site = Site("a", Linear(), {"weight": TensorId("a.weight")}, tuple(weight.shape))
    (form,) = RTN()(site, {"weight": weight}, {}, grid).hold.values()
    return form


def stored(lesson: Practice, v: float) -> list[float]:
    """What is stored where every V is v."""
    soft = lesson.soften(held(W), W)
    with torch.no_grad():
        soft.at.v.fill_(v)
    return soft.harden().dense()[0].tolist()


def test_soft_choices_by_hand():
    at = torch.tensor([0.0, 1 / 3, 0.5, 1.0])
    assert SOFT["cosine"][0](at).tolist() == pytest.approx([0.0, 0.25, 0.5, 1.0])
    # sigmoid(0) = 1 / 2, sigmoid(ln 3) = 3 / 4; stretched: .75 * 1.2 - .1
    assert SOFT["sigmoid"][0](torch.tensor([0.0, math.log(3)])).tolist() == pytest.approx([0.5, 0.75])
    assert SOFT["rectified"][0](torch.tensor([0.0, math.log(3), 9.0])).tolist() == pytest.approx([0.5, 0.8, 1.0])
    h = torch.linspace(0.01, 0.99, 9)
    for function, inverse in SOFT.values():
        torch.testing.assert_close(function(inverse(h)), h)


@pytest.mark.parametrize("soft", [*SOFT, "straight"])
@pytest.mark.parametrize("reach", [1, 2])
def test_what_it_begins_with(soft, reach):
    begun = replace(PLAIN, soft=soft, reach=reach).soften(held(W), W)
    assert begun.harden().dense().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    # a soft choice is the weight itself, a straight one what is stored
    torch.testing.assert_close(begun.dense(), begun.harden().dense() if soft == "straight" else W, rtol=0, atol=5e-3)


def test_how_far_a_code_may_move():
    one = replace(PLAIN, reach=1)
    # between the codes below and above
    assert (stored(one, 0.0), stored(one, 3.0)) == ([-1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 2.0])
    # one more on each side, within the grid
    assert (stored(PLAIN, 0.0), stored(PLAIN, 3.0)) == ([-1.0, -1.0, -1.0, 1.0], [1.0, 2.0, 2.0, 2.0])
    soft = PLAIN.soften(held(W), W)
    soft.dense().sum().backward()
    # in steps, through the rounding
    assert soft.at.v.grad.tolist() == [1.0] * 4
    # codes less their zero, times the scale
    assert soft.step.grad.tolist() == [[2.0]]
    with torch.no_grad():
        soft.step.fill_(math.log(2.0))
        soft.at.v.sub_(4.0)
    soft.settle()
    assert soft.at.v.tolist() == [0.0] * 4
    assert soft.harden().dense().tolist() == [[-2.0, -2.0, -2.0, 2.0]]


def test_which_weights_move():
    near, large = (replace(PLAIN, share=0.5, among=among) for among in ("near", "large"))
    assert stored(near, 3.0) == [-1.0, 2.0, 2.0, 2.0]
    assert stored(large, 0.0) == [-1.0, 0.0, 1.0, 1.0]
    assert stored(large, 3.0) == [1.0, 0.0, 1.0, 2.0]
    # what fills a ragged end is no weight
    form = held(W[:, :3], Grid(2, 2))
    assert [len(replace(PLAIN, share=share, among="random").soften(form, W[:, :3]).at.v) for share in (1.0, 0.7)] == [3, 2]


def test_the_penalty_by_hand():
    soft = replace(PLAIN, soft="cosine", weigh=2.0).soften(held(W), W)
    with torch.no_grad():
        soft.at.v.fill_(0.5)
    # at codes 1, 1.5, 1.5 and 2.5
    assert soft.penalty(0.1) is None
    assert float(soft.penalty(1.0).detach()) == pytest.approx(6.0)
    assert PLAIN.soften(held(W), W).penalty(1.0) is None


def test_noise_is_for_learning_alone():
    assert PLAIN.soften(held(W), W).feed is None
    feed = replace(PLAIN, noise=0.5).soften(held(W), W).feed
    x = torch.arange(4000.0).reshape(1000, 4)
    with torch.no_grad():
        assert torch.equal(feed(x), x)
    # a uniform spread of 4,000 has a deviation of 4,000 / sqrt(12) = 1,154.7
    assert float((feed(x) - x).std()) == pytest.approx(577.4, rel=0.05)


def test_uneven_levels():
    table = torch.tensor([-1.0, -0.25, 0.5, 2.0], dtype=torch.bfloat16)
    codes, weight = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.tensor([[-1.0, 0.0, 0.5, 1.5]])
    form = Leveled.of((1, 4), Levels(2, group=None), codes, torch.ones(1, 1), None, table)
    soft = replace(PLAIN, soft="cosine").soften(form, weight)
    # 0 stands a third of the way from -.25 to .5, 1.5 two thirds from .5 to 2
    torch.testing.assert_close(soft.dense(), weight, rtol=0, atol=5e-3)
    assert soft.harden().dense().tolist() == form.dense().tolist()
    with torch.no_grad():
        soft.at.v.fill_(1.0)
    assert soft.harden().dense().tolist() == [[0.5, 2.0, 2.0, 2.0]]
    assert soft.harden().nbytes == form.nbytes


def learned(lesson, weight: torch.Tensor, x: torch.Tensor, grid: Grid) -> float:
    """Squared error of the output after a lesson."""
    soft = lesson.soften(held(weight, grid), weight)
    batches = x.split(lesson.batch)
    tune(
        lambda i, weights: batches[i] @ weights["a"].T, [batch @ weight.T for batch in batches], {"a": soft}, lesson,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return float((x @ (soft.harden().dense() - weight).T).square().sum(-1).mean())


def test_adaround_is_one_of_its_settings():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g) @ torch.randn(6, 6, generator=g)
    weight = torch.randn(1, 6, generator=g)
    like = Practice(soft="rectified", reach=1, weigh=1.0, decay="constant", steps=400, batch=32, rates=(("v", 1e-2),))
    # the best of all choices between neighbours
    assert learned(like, weight, x, Grid(3, None)) == pytest.approx(0.468828, rel=1e-4)
    ada = AdaRound(steps=50, batch=32, weigh=1.0)
    assert learned(replace(like, steps=50), weight, x, Grid(3, None)) == learned(ada, weight, x, Grid(3, None))


@pytest.mark.parametrize(("soft", "most"), [("rectified", 0.5), ("sigmoid", 0.6), ("cosine", 0.95), ("straight", 0.8)])
def test_it_learns(soft, most):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128, 24, generator=g) @ torch.randn(24, 24, generator=g)
    weight = torch.randn(12, 24, generator=g)
    nearest = float((x @ (held(weight, Grid(3, None)).dense() - weight).T).square().sum(-1).mean())
    rate, decay = (2e-2, "cosine") if soft == "straight" else (5e-2, "constant")
    lesson = Practice(soft=soft, steps=200, batch=32, rates=(("v", rate), ("step", 3e-3)), decay=decay, weigh=10.0)
    assert learned(lesson, weight, x, Grid(3, None)) < most * nearest


@pytest.mark.parametrize("wrong", [{"reach": 0}, {"share": 0.0}, {"soft": "hard"}, {"among": "all"}, {"noise": -1.0}])
def test_what_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Practice(**wrong)
