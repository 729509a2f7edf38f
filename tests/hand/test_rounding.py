"""Learned rounding by hand: FlexRound's division and AdaRound's choice on a grid of step 1 with zero point 1 and codes 0 to 3."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from laconic.core.packed import Dense, Joined, Sum, Transposed
from laconic.core.site import Conv, Linear, Site, TensorId
from laconic.core.transform import Layer, Window
from laconic.kernels.grids import Grid
from laconic.methods.quantize.grid.apart import Apart
from laconic.methods.quantize.grid.flat import Flat
from laconic.methods.quantize.rotate.hadamard import Rotated
from laconic.methods.quantize.round.adaround import AdaRound, indecision, rectified, unrectified
from laconic.methods.quantize.round.flexround import FlexRound, divided
from laconic.methods.quantize.round.inputs import Fed
from laconic.methods.quantize.round.rtn import RTN
from laconic.tuning import tune

W = torch.tensor([[-1.0, 0.4, 0.6, 2.0]])
TWO = Grid(2, None)


def held(weight: torch.Tensor, grid: Grid = TWO, shape: tuple[int, ...] | None = None):
    shape = shape or tuple(weight.shape)
    site = Site("a", Conv() if len(shape) > 2 else Linear(), {"weight": TensorId("a.weight")}, shape)
    (form,) = RTN()(site, {"weight": weight}, {}, grid).hold.values()
    return form


def test_division_by_hand():
    # codes are 1 more than the rounded quotients, within 0 to 3
    one, zero = torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    codes = divided(W[None], one, torch.zeros(1, 1, 4), zero, 2)
    assert codes.tolist() == [[[0.0, 1.0, 2.0, 3.0]]]
    # .6 / 2 rounds to 0; 2 / 5 rounds to 0, two steps below; .4 / .5 rounds to 1; -1 / .25 = -4 is clipped at code 0
    codes = divided(W[None], one, torch.tensor([0.25, 0.5, 2.0, 5.0]).log(), zero, 2)
    assert codes.tolist() == [[[0.0, 2.0, 1.0, 1.0]]]


def test_flexround_moves_large_weights_further():
    soft = FlexRound().soften(held(W), W)
    assert soft.dense().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    # through the rounding, d dense / d log S2 is -w: proportional to the weight
    soft.dense().sum().backward()
    torch.testing.assert_close(soft.s2.grad, -W[None])
    torch.testing.assert_close(soft.s3.grad, torch.tensor([[[-2.0]]]))
    # s1 multiplies and divides: round(w) - w, which is 0, -.4, .4, 0
    torch.testing.assert_close(soft.s1.grad, torch.tensor([[0.0]]))
    with torch.no_grad():
        soft.s2[..., 3] = math.log(5.0)
    # two steps down, which no choice between neighbours reaches; stored on the same grid
    assert soft.harden().dense().tolist() == [[-1.0, 0.0, 1.0, 0.0]]
    with torch.no_grad():
        soft.s1.fill_(math.log(2.0))
    # the grid is twice as wide: -.5 rounds to 0, as .2 and .3 do
    assert soft.harden().dense().tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert soft.harden().scales.float().tolist() == [[2.0]]


def test_a_factor_for_each_input_channel_of_a_convolution():
    weight = torch.tensor([[-1.0, 0.6, 0.6, 2.0]])
    soft = FlexRound().soften(held(weight, shape=(1, 2, 1, 2)), weight.reshape(1, 2, 1, 2))
    with torch.no_grad():
        soft.s4[1] = math.log(2.0)
    # .6 / 2 rounds to 0, 2 / 2 to 1; the first channel stays
    assert soft.dense().tolist() == [[[[-1.0, 1.0]], [[0.0, 1.0]]]]
    assert not hasattr(FlexRound().soften(held(weight), weight), "s4")


def test_the_rectified_sigmoid_by_hand():
    # sigmoid(0) * 1.2 - .1 = .5; at 2.5 and more it is 1 (sigmoid(2.5) = .924 > 11 / 12)
    assert rectified(torch.tensor([0.0, 2.5, -2.5])).tolist() == pytest.approx([0.5, 1.0, 0.0])
    # h = .25: sigmoid = .35 / 1.2 = 7 / 24, its logit is ln(7 / 17)
    assert float(unrectified(torch.tensor(0.25))) == pytest.approx(math.log(7 / 17), abs=1e-6)
    h = torch.linspace(0, 1, 11)
    torch.testing.assert_close(rectified(unrectified(h)), h)


def test_the_penalty_by_hand():
    h = torch.tensor([0.5, 0.9])
    assert indecision(h, 0.1) is None
    # beta 20: 1 - 0 and 1 - .8^20 = 1 - .0115292; beta 11 half-way; beta 2: 1 and 1 - .64
    assert float(indecision(h, 0.2)) == pytest.approx(1.9884708, abs=1e-5)
    assert float(indecision(h, 0.6)) == pytest.approx(2 - 0.8**11, abs=1e-5)
    assert float(indecision(h, 1.0)) == pytest.approx(1.36, abs=1e-5)
    # what a ragged end is filled with pays nothing
    soft = AdaRound(weigh=1.0).soften(held(W[:, :3], Grid(2, 2)), W[:, :3])
    with torch.no_grad():
        soft.v.zero_()
    assert float(soft.penalty(1.0).detach()) == pytest.approx(3.0)


def test_adaround_begins_at_the_float_weight_and_goes_one_way_or_the_other():
    soft = AdaRound().soften(held(W), W)
    torch.testing.assert_close(soft.dense(), W, rtol=0, atol=2e-3)
    assert soft.harden().dense().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    with torch.no_grad():
        soft.v.copy_(torch.tensor([9.0, 9.0, -9.0, 9.0]))
    # -1 and 2 are codes themselves: up is one more, which the greatest code does not have
    assert soft.harden().dense().tolist() == [[0.0, 1.0, 0.0, 2.0]]
    torch.testing.assert_close(soft.dense(), soft.harden().dense())


WRAPPED = {
    "a sum": lambda form: Sum(form, Dense(torch.ones(2, 8))),
    "transposed": Transposed,
    "joined": lambda form: Joined([form, form], 0, 1),
    "inputs rounded": lambda form: Fed(form, 8),
    "rotated": Rotated,
    "flat": lambda form: Flat((2, 2, 4), form),
    "few columns apart": lambda form: Apart((2, 16), form, form, torch.arange(8, dtype=torch.int16)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_learned_inside_another_form_pays_its_penalty_and_is_told_of_each_step(name):
    inner = held(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
    form = WRAPPED[name](inner)
    made, told = [], []

    def way(one, target):
        soft = AdaRound(weigh=1.0).soften(one, target)
        soft.settle = lambda: told.append(soft)
        made.append(soft)
        return soft

    soft = form.soften(form.dense(), way)
    assert made and soft.within()
    with torch.no_grad():
        for one in made:
            # half way between two codes
            one.v.zero_()
    paid = sum(float(one.penalty(0.9).detach()) for one in made)
    assert paid > 0 and float(soft.penalty(0.9).detach()) == pytest.approx(paid)
    assert soft.penalty(0.0) is None
    soft.settle()
    assert told == made


def learned(lesson, weight: torch.Tensor, x: torch.Tensor, grid: Grid) -> float:
    """Squared error of the output after a lesson."""
    soft = lesson.soften(held(weight, grid), weight)
    batches = x.split(lesson.batch)
    tune(
        lambda i, weights: batches[i] @ weights["a"].T, [batch @ weight.T for batch in batches], {"a": soft}, lesson,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return float((x @ (soft.harden().dense() - weight).T).square().sum(-1).mean())


def test_adaround_finds_the_best_of_all_choices():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g) @ torch.randn(6, 6, generator=g)
    weight = torch.randn(1, 6, generator=g)
    grid = Grid(3, None)
    form = held(weight, grid)
    _, scale, zero = form.plain()
    down = (weight / scale).floor()
    errors = []
    for up in itertools.product((0.0, 1.0), repeat=6):
        dense = ((down + torch.tensor([up]) + zero).clamp(0, 7) - zero) * scale
        errors.append(float((x @ (dense - weight).T).square().sum(-1).mean()))
    nearest = float((x @ (form.dense() - weight).T).square().sum(-1).mean())
    # lambda in proportion to an error of about 1
    found = learned(AdaRound(steps=400, batch=32, weigh=1.0), weight, x, grid)
    assert found == pytest.approx(min(errors), rel=1e-4)
    assert (found, nearest) == pytest.approx((0.468828, 0.816437), rel=1e-4)
    # a learned grid size and moves of more than a step go below the best choice
    rates = tuple((name, 1e-2) for name in ("s1", "s2", "s3"))
    assert learned(FlexRound(steps=400, batch=32, rates=rates, decay="cosine"), weight, x, grid) < min(errors)


def test_scopes():
    assert (FlexRound().scope, Window().blocks, Window().overlap) == (Window(), 1, 0)
    assert (FlexRound().steps, FlexRound().batch, AdaRound().steps, AdaRound().weigh) == (5000, 32, 10_000, 0.01)
    assert Layer() != Window()
    with pytest.raises(ValueError, match="overlap=2"):
        Window(blocks=2, overlap=2)
