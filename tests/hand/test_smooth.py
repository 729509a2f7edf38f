"""Scales of channels, cut ranges and the order of columns by hand: expected numbers in the file."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.aligning import Edit, edited, kept_as_it_is
from laconic.core.site import Edge, IndexMap, Linear, Member, Norm, Scale, Site, TensorId
from laconic.core.statistic import Gram, Peaks, Seen, Sizes
from laconic.core.transform import Stretched
from laconic.kernels.grids import Grid, fit_by_output
from laconic.kernels.obs import inverse_factor, round_columns
from laconic.methods.quantize.round.clipped import Clipped
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.lwc import LWC
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.smooth.awq import AWQ, loss, powered
from laconic.methods.quantize.smooth.smoothquant import SmoothQuant, migrated

TWO = Grid(2, None)


def linear(n: int, m: int, name: str = "a", **context) -> Site:
    return Site(name, Linear(), {"weight": TensorId(f"{name}.weight")}, (n, m), {"part": name}, {"layer": 0, **context})


def norm(width: int, plus: float = 0.0) -> Site:
    return Site("norm", Norm(), {"weight": TensorId("norm.weight")}, (width,), {}, {"plus": plus})


def edge(*readers: Site, plus: float = 0.0) -> Edge:
    width = readers[0].shape[1]
    members = tuple(Member(site, 1, IndexMap(width)) for site in readers)
    return Edge("norm", width, width, (Member(norm(width, plus), 0, IndexMap(width)),), members, allows=(Scale(),))


# ---- scales


def test_sizes_are_means_of_sizes():
    x = torch.tensor([[1.0, -4.0], [-3.0, 0.0]])
    sizes = Sizes()
    assert sizes.finish(sizes.update(sizes.init(linear(1, 2)), Seen(x=x))).tolist() == [2.0, 2.0]


def test_awq_by_hand():
    sizes = torch.tensor([1.0, 16.0, 1.0])
    assert powered(sizes, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert powered(sizes, 0.5).tolist() == [0.5, 2.0, 0.5]
    assert powered(sizes, 1.0).tolist() == [0.25, 4.0, 0.25]
    # a dead channel is taken for one of a ten-thousandth: root of 1e-4 against 1
    torch.testing.assert_close(powered(torch.tensor([0.0, 1.0]), 0.5), torch.tensor([0.1, 10.0]))
    weight, gram = torch.tensor([[3.0, 0.4, 0.0]]), torch.diag(torch.tensor([16.0, 256.0, 1.0]))
    # step 1: 0.4 goes to 0. Of (1.5, 0.8, 0) the step is 0.5 and 0.8 goes to 1, which is 0.5. Of (0.75, 1.6, 0) the step is 0.53515625 (as
    # bf16): 0.75 goes to one step, which is 2.140625, and 1.6 to three, which is 0.401367
    found = [loss([weight], gram, powered(sizes, exponent), TWO) for exponent in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([0.16 * 256, 0.01 * 256, 0.859375**2 * 16 + 0.0013671875**2 * 256], rel=1e-4)
    # a quiet first channel leaves the last as the best
    change = AWQ(bits=2, group=None, steps=2)(edge(linear(1, 3)), lambda _: weight, {"a": {Gram(): gram, Sizes(): sizes}})
    ((_, move),) = change.move
    assert move.factors.tolist() == [2.0, 0.5, 2.0]
    quiet = {"a": {Gram(): torch.diag(torch.tensor([1.0, 256.0, 1.0])), Sizes(): sizes}}
    ((_, move),) = AWQ(bits=2, group=None, steps=2)(edge(linear(1, 3)), lambda _: weight, quiet).move
    assert move.factors.tolist() == [4.0, 0.25, 4.0]
    # on the grid already: no scale is better than none
    assert not AWQ(bits=2, group=None)(edge(linear(1, 3)), lambda _: torch.tensor([[3.0, 1.0, 0.0]]), quiet).move
    assert not AWQ()(edge(linear(1, 3)), lambda _: weight, {"a": {}}).move


def test_matrices_that_share_an_input_share_a_scale_and_heads_that_share_values_do():
    sizes, gram = torch.tensor([1.0, 16.0, 1.0]), torch.diag(torch.tensor([16.0, 256.0, 1.0]))
    weights = {"a": torch.tensor([[3.0, 0.4, 0.0]]), "b": torch.tensor([[0.0, 3.0, 1.0]])}
    both = sum(loss([weight], gram, powered(sizes, 0.5), TWO) for weight in weights.values())
    assert loss(list(weights.values()), gram, powered(sizes, 0.5), TWO) == pytest.approx(both)
    # a router reads the norm first, and what it holds is looked at by no one
    routed = edge(linear(1, 3, "router"), linear(1, 3))
    stats = {"router": {Gram(): gram, Sizes(): sizes, Peaks(): sizes}}
    for method in (AWQ(bits=2, group=None, steps=2), SmoothQuant()):
        assert {site.name for site, _ in method.looks(routed)} == {"router"}
        ((_, move),) = method(routed, lambda site: weights[site.name], stats).move
        assert move.factors.shape == (3,)
    # one channel of v is read by columns 0 and 2, one by 1 and 3: the mean of their sizes, 1 and 16, as above
    reader = Member(linear(1, 4), 1, IndexMap(4, table=((0, 2), (1, 3))))
    heads = Edge("value", 2, 2, (Member(linear(2, 4, "v"), 0, IndexMap(2)),), (reader,), allows=(Scale(),))
    seen = {Gram(): torch.diag(torch.tensor([16.0, 256.0, 1.0, 1.0])), Sizes(): torch.tensor([0.5, 12.0, 1.5, 20.0])}
    ((_, move),) = AWQ(bits=2, group=None, steps=2)(heads, lambda _: torch.tensor([[3.0, 0.4, 0.0, 0.0]]), {"a": seen}).move
    assert move.factors.tolist() == [2.0, 0.5]


def test_smoothquant_by_hand():
    inputs, weights = torch.tensor([16.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 1.0, 0.0])
    # roots of 16 / 1 and 1 / 4; a dead channel stays
    assert migrated(inputs, weights, 0.5).tolist() == [4.0, 0.5, 1.0, 1.0]
    assert migrated(inputs, weights, 1.0).tolist() == [16.0, 1.0, 1.0, 1.0]
    assert migrated(inputs, weights, 0.0).tolist() == [1.0, 0.25, 1.0, 1.0]
    # after it, inputs and weights are as large: 16 / 4 = 1 * 4, 1 / 0.5 = 4 * 0.5
    read = {"q": torch.tensor([[1.0, -2.0]]), "k": torch.tensor([[0.5, 4.0]])}
    ((_, move),) = SmoothQuant()(
        edge(linear(1, 2, "q"), linear(1, 2, "k")), lambda site: read[site.name], {"q": {Peaks(): inputs[:2]}}
    ).move
    assert move.factors.tolist() == [0.25, 2.0]
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        SmoothQuant(alpha=1.5)


def test_norms_take_factors_that_they_can_store():
    at = torch.tensor([[0], [1]])
    # a norm that adds one to what it stores: (0.5 + 1) 2 - 1
    twice = Edit(0, at, Stretched(torch.tensor([2.0, 1.0])), reads=False, plus=1.0)
    assert edited(torch.tensor([0.5, -0.25]), twice).tolist() == [2.0, -0.25]
    # 1.5 * 0.667 = 1.0005 is stored as 1, so the factor is 2 / 3; a norm of zero keeps its factor
    weight = torch.tensor([1.5, 0.0])
    move = kept_as_it_is(edge(linear(1, 2)), Stretched(torch.tensor([0.667, 3.0])), lambda _: weight)
    assert move.factors.tolist() == pytest.approx([2 / 3, 3.0], abs=1e-12)
    # beside one that is added: 2.5 * 0.667 - 1 = 0.6675 is stored as 0.66796875
    move = kept_as_it_is(edge(linear(1, 2), plus=1.0), Stretched(torch.tensor([0.667, 1.0])), lambda _: weight)
    assert move.factors.tolist() == pytest.approx([1.66796875 / 2.5, 1.0], abs=1e-12)


# ---- ranges


def test_ranges_are_cut_by_the_output_of_a_group():
    weight = torch.tensor([[1.0, 1.0, 1.0, 4.0]])
    # whole: the step is 4 / 3, 1.3359375 as bf16, and ones go to it; cut at three quarters the step is 1 and only 4 errs, by 1.
    # Inputs that come alone: 3 * 0.336^2 + 0.008^2 = 0.339 against 1. Inputs that come together: 1.0156^2 = 1.031 against 1
    alone, together = (fit_by_output(weight, TWO, gram, steps=2) for gram in (torch.eye(4), torch.ones(4, 4)))
    assert (alone[0].item(), alone[1].item()) == (1.3359375, 0.0)
    assert (together[0].item(), together[1].item()) == (1.0, 0.0)
    # in groups of three what groups share does not count, and a ragged end is a group
    scale, zero = fit_by_output(weight, Grid(2, 3), torch.ones(4, 4), steps=2)
    assert scale.tolist() == [[pytest.approx(1 / 3, rel=2e-3), pytest.approx(4 / 3, rel=2e-3)]]
    assert zero.tolist() == [[0.0, 0.0]]
    change = Clipped(steps=2)(linear(1, 4), {"weight": weight}, {Gram(): torch.ones(4, 4)}, TWO)
    (form,) = change.hold.values()
    assert form.dense().tolist() == [[1.0, 1.0, 1.0, 3.0]]
    with pytest.raises(ValueError, match="least=0"):
        Clipped(least=0.0)


def test_learned_clipping_by_hand():
    weight = torch.tensor([[-1.0, 0.4, 0.6, 2.0]])
    (held,) = RTN()(linear(1, 4), {"weight": weight}, {}, TWO).hold.values()
    soft = LWC().soften(held, weight)
    # whole ranges begin at 4, where the step is 1 and the zero is 1
    assert (soft.c.item(), soft.d.item()) == (4.0, 4.0)
    assert soft.dense().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    # the upper end halved: from -1 to 1, a step of 2 / 3, as bf16 0.66796875; zero stays 1, 2 is cut to two steps
    half = 1 / (1 + math.exp(-4)) / 2
    with torch.no_grad():
        soft.c.fill_(math.log(half / (1 - half)))
    step = 0.66796875
    assert soft.dense().tolist() == [[-step, step, step, 2 * step]]
    # of the cut weight, (3 - z) h: 3 h - h z is 2 / 3 by the step and -1 / (3 h) times -h by the zero, times 1 - sigmoid of what c is
    soft.dense()[0, 3].backward()
    assert soft.c.grad.item() == pytest.approx((2 / 3 + 1 / (3 * step)) * (1 - half), rel=1e-4)
    assert soft.harden().dense().tolist() == soft.dense().tolist()
    # ranges that were cut begin where they are: 1.5 of 2 is sigmoid(ln 3)
    (cut,) = Clipped(least=0.75, steps=1)(
        linear(1, 4), {"weight": weight}, {Gram(): torch.diag(torch.tensor([0.0, 1, 1, 0]))}, TWO
    ).hold.values()
    begun = LWC().soften(cut, weight)
    assert begun.dense().tolist() == cut.dense().tolist()
    # a symmetric grid has one strength for both ends
    (even,) = RTN()(linear(1, 4), {"weight": weight}, {}, Grid(2, None, symmetric=True)).hold.values()
    assert [name for name, _ in LWC().soften(even, weight).named_parameters()] == ["c"]
    assert LWC().soften(even, weight).c.item() == pytest.approx(4.0, abs=0.1)
    assert (LWC().steps, LWC().batch) == (2560, 1)


# ---- order


def test_the_order_of_columns_changes_what_they_become():
    # the second column's inputs are twice as loud; the third holds the grid at steps of 1 and hears of nothing
    gram = torch.tensor([[1.0, 0.5, 0.0], [0.5, 4.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[0.4, 0.47, 3.0]])
    # as stored: 0.4 goes to 0, its 0.4 times 0.5 / 4 makes 0.52 of 0.47, which goes to 1.
    # loudest first: 0.47 goes to 0, its 0.47 times 0.5 / 1 makes 0.635 of 0.4, which goes to 1
    for order, codes, error in (("stored", [[0, 1, 3]], 1.0716), ("activation", [[1, 0, 3]], 0.9616)):
        (form,) = GPTQ(damping=0.0, order=order)(linear(1, 3), {"weight": weight}, {Gram(): gram}, TWO).hold.values()
        assert form.plain()[0].tolist() == codes
        delta = form.dense() - weight
        assert float((delta @ gram * delta).sum()) == pytest.approx(error, abs=1e-4)


def test_groups_stay_where_they_are_stored_whatever_the_order():
    # two groups of two; the last column is visited first, and each group has the scale of its weights as they are
    gram = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    order = torch.tensor([3, 2, 1, 0])
    (out,) = round_columns(torch.tensor([[0.0, 3.0, 1.0, 6.0]]), inverse_factor(gram[order][:, order], 0.0), [Grid(2, 2)], order=order)
    assert out.scale.tolist() == [[1.0, 2.0]]
    assert out.codes.tolist() == [[0, 3, 0, 3]]
