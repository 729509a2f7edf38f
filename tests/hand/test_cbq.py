"""CBQ by hand: outliers among a few sizes, choices shifted by a thin product, steps of weights and of inputs that learn."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.core.packed import Dense
from laconic.core.site import Edge, IndexMap, Linear, Member, Norm, Scale, Site, TensorId
from laconic.core.statistic import Peaks
from laconic.core.transform import Window
from laconic.kernels.grids import Grid
from laconic.kernels.inputs import rounded, stepped
from laconic.kernels.losses import SquaredAndDivergence
from laconic.kernels.outliers import fence, parting
from laconic.methods.quantize.round.cbq import CBQ
from laconic.methods.quantize.round.fenced import Fenced
from laconic.methods.quantize.round.inputs import Fed, Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.smooth.cfp import CFP, quieted

W = torch.tensor([[-1.0, 0.4, 0.6, 2.0]])


def site(n: int, m: int) -> Site:
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m))


def held(weight: torch.Tensor, grid: Grid):
    (form,) = RTN()(site(*weight.shape), {"weight": weight}, {}, grid).hold.values()
    return form


def test_outliers_by_hand():
    # of 1 to 9 the quartiles are 3 and 7, the fence 7 + 1.5 * 4
    sizes = torch.arange(1.0, 10.0)
    assert fence(sizes, 1.5) == 13.0 and parting(sizes) == 9.0
    # quartiles 3.75 and 10.25, fence 20: only 40 may be one
    few = torch.cat([sizes, torch.tensor([14.0, 15.0, 40.0])])
    assert fence(few, 1.5) == 20.0
    assert parting(few) == 15.0
    # 1 to 9 twice, and three more: quartiles 3 and 8, fence 15.5
    twice = sizes.repeat(2)
    # candidates 20, 21, 50: gaps squared 121, 1, 841, less variances 0, 0, .25: the cut is below 50
    many = torch.cat([twice, torch.tensor([20.0, 21.0, 50.0])])
    assert fence(many, 1.5) == 15.5 and parting(many) == 21.0
    # candidates 50, 51, 52 stand together: the gap to 9 is the widest
    assert parting(torch.cat([twice, torch.tensor([50.0, 51.0, 52.0])])) == 9.0
    # a great weight of the variance moves the cut down: 20 alone stays, then nothing does
    wide = torch.cat([twice, torch.tensor([20.0, 40.0, 70.0])])
    assert parting(wide) == 40.0 and parting(wide, weigh=9.0) == 20.0
    # nothing stands out: all alike, all zeros, one, none; zeros do not count
    assert (
        parting(torch.ones(8)) == 1.0 and parting(torch.zeros(8)) == 0.0 and parting(torch.ones(1)) == 1.0 and parting(torch.ones(0)) == 0.0
    )
    assert parting(torch.tensor([0.0] * 7 + [5.0])) == 5.0 and parting(torch.cat([torch.zeros(90), few])) == 15.0


def test_only_outlying_channels_are_made_quieter():
    peaks = torch.cat([torch.arange(1.0, 10.0), torch.tensor([81.0])])
    # sqrt(81 / 9)
    assert quieted(peaks, 1.5, 1.0).tolist() == [1.0] * 9 + [3.0]
    # dead channels are no size to come down to
    assert quieted(torch.tensor([0.0] * 7 + [5.0]), 1.5, 1.0).tolist() == [1.0] * 8
    norm = Site("n", Norm(), {"weight": TensorId("n.weight")}, (10,))
    reader = Site("a", Linear(), {"weight": TensorId("a.weight")}, (3, 10), context={"layer": 0})
    edge = Edge("n", 10, 10, (Member(norm, 0, IndexMap(10)),), (Member(reader, 1, IndexMap(10)),), allows=(Scale(),))
    ((_, move),) = CFP()(edge, lambda s: torch.ones(s.shape), {"a": {Peaks(): peaks}}).move
    torch.testing.assert_close(move.factors, torch.tensor([1.0] * 9 + [1 / 3]))
    assert CFP()(edge, lambda s: torch.ones(s.shape), {"a": {Peaks(): torch.ones(10)}}).move == ()
    assert CFP()(edge, lambda s: torch.ones(s.shape), {"a": {}}).move == ()
    with pytest.raises(ValueError, match="reach=-1"):
        CFP(reach=-1)


def test_ranges_end_where_outliers_begin():
    weight = torch.cat([torch.arange(-7.0, 8.0), torch.tensor([60.0])])[None]
    (form,) = Fenced()(site(1, 16), {"weight": weight}, {}, Grid(4, None)).hold.values()
    # 60 is cut to 7: the grid of 4 bits from -7 to 7 has steps of 14 / 15, where whole ranges have 67 / 15
    assert form.dense().max() < 8 and float(form.wide_scales()[0, 0]) == pytest.approx(14 / 15, rel=4e-3)
    assert float(held(weight, Grid(4, None)).wide_scales()[0, 0]) == pytest.approx(67 / 15, rel=4e-3)
    (plain,) = Fenced()(site(1, 15), {"weight": weight[:, :15]}, {}, Grid(4, 4)).hold.values()
    assert torch.equal(plain.dense(), held(weight[:, :15], Grid(4, 4)).dense())
    (dead,) = Fenced()(site(2, 5), {"weight": torch.zeros(2, 5)}, {}, Grid(2, 3)).hold.values()
    assert dead.dense().tolist() == [[0.0] * 5] * 2


def test_choices_begin_at_the_nearest_and_a_product_shifts_them():
    soft = CBQ(rank=1).soften(held(W, Grid(2, None)), W)
    assert [tuple(p.shape) for p in (soft.step, soft.a1, soft.a2)] == [(1, 1), (1, 1), (1, 4)]
    # soft, it is the float weight, but for ties; hard, what is nearest
    torch.testing.assert_close(soft.dense(), torch.tensor([[-1.0, 0.4, 0.6, 2.0]]))
    assert soft.harden().dense().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    with torch.no_grad():
        soft.a1.fill_(1.0)
        soft.a2.copy_(torch.tensor([[0.0, 1.0, -1.0, 0.0]]))
    # V_0 of .4 is logit(.5 / 1.2) = -.336: 1 more is above a half
    assert soft.harden().dense().tolist() == [[-1.0, 1.0, 0.0, 2.0]]
    # the factor of V: none at first, then 60^0.5 half-way, then 60; at the end h is hard
    assert soft.penalty(0.1) is None
    v = torch.tensor(math.log(5 / 7) + 1)
    for done, factor in ((0.1, 1.0), (0.6, 60**0.5), (1.0, 60.0)):
        soft.penalty(done)
        wished = ((factor * v).sigmoid() * 1.2 - 0.1).clamp(0, 1)
        torch.testing.assert_close(soft.dense()[0, 1], wished, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(soft.dense(), soft.harden().dense())
    # the penalty of AdaRound, of h without the factor
    assert float(CBQ(rank=1, weigh=2.0).soften(held(W, Grid(2, None)), W).penalty(1.0).detach()) > 0


def test_the_step_has_the_gradient_of_a_learned_step():
    weight = torch.tensor([[-1.0, 0.4, 0.6, 3.4]])
    form = held(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), Grid(2, None))
    soft = CBQ().soften(form, weight)
    soft.dense().sum().backward()
    # inside, the soft weight is the weight whatever the step; 3.4 is clipped at code 3, two steps above zero
    torch.testing.assert_close(soft.step.grad, torch.tensor([[2.0]]), rtol=1e-4, atol=1e-4)
    assert CBQ(rank=None).soften(form, weight).v.shape == (1, 4)
    assert CBQ(rank=9).soften(form, weight).a2.shape == (1, 4)


def test_the_step_of_inputs_by_hand():
    x = torch.tensor([[7.0, 3.2, -0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(stepped(x, 4, torch.ones(1)), rounded(x, 4))
    share = torch.full((1,), 0.5, requires_grad=True)
    x.requires_grad_()
    y = stepped(x, 4, share)
    # steps of a half: 7 goes to 3.5, 3.2 to 3
    assert y.tolist() == [[3.5, 3.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    # per unit of the share a step grows by 1: 7 beyond, then 6 - 6.4 and -1 + .8
    torch.testing.assert_close(share.grad, torch.tensor([7.0 - 0.4 - 0.2]))


def test_a_share_of_inputs_is_held_learned_and_counted():
    level = WeightAndInputs(Grid(4, None), 4, step=True)
    method = Inputs(RTN())
    (form,) = method(site(2, 6), {"weight": torch.randn(2, 6)}, {}, level).hold.values()
    plain = WeightAndInputs(Grid(4, None), 4)
    assert form.nbytes == method.stored(site(2, 6), level) == method.stored(site(2, 6), plain) + 4
    soft = CBQ().soften(form, torch.randn(2, 6))
    with torch.no_grad():
        soft.ends.fill_(math.log(0.5))
    x = torch.randn(3, 6)
    hard = soft.harden()
    assert float(hard.share) == pytest.approx(0.5)
    assert torch.equal(hard.feed(x), soft.feed(x)) and hard.nbytes == form.nbytes
    again = Fed.restore(hard.describe(), hard.tensors())
    assert torch.equal(again.matmul(x), hard.matmul(x))
    assert "share" not in Fed(Dense(torch.ones(2, 2)), 4).tensors()


def test_the_objective_by_hand():
    output, target = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(SquaredAndDivergence(2.0)(output, target, None)) == pytest.approx(math.log(3.0) ** 2 + 2 * kl, rel=1e-5)
    assert (CBQ().scope, CBQ().targets, CBQ().rank, CBQ().steps) == (Window(2, 1), "both", 5, 384)
    with pytest.raises(ValueError, match="rank=0"):
        CBQ(rank=0)
    with pytest.raises(ValueError, match=r"sharp=0\.5"):
        CBQ(sharp=0.5)
