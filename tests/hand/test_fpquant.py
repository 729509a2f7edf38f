"""Floats of any split by hand: their numbers, the nearest, the ones below and above, the search, and rounding that is learned."""

from __future__ import annotations

import pytest
import torch

from laconic.core.packed import restore
from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Seen
from laconic.kernels.levels import FLOATS, values
from laconic.kernels.splits import Floated, Split, from_codes, nearest, numbers, rounded, searched, splits, to_codes, under
from laconic.methods.quantize.learn.fpround import FPRound
from laconic.methods.quantize.round.fpquant import FPQuant, Single, SplitBits

E2M1, W4A8 = Split(2, 1), SplitBits(4, 8)


def site(n, m):
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m))


def held(weight, x, level=W4A8):
    stats = {kind: kind.finish(kind.update(kind.init(site(*weight.shape)), Seen(x=x))) for kind in FPQuant().wants}
    (form,) = FPQuant()(site(*weight.shape), {"weight": weight}, stats, level).hold.values()
    return form


def test_numbers_of_a_split():
    assert numbers(torch.arange(8), E2M1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert numbers(torch.arange(-3, 1), Split(3, 0)).tolist() == [-1, -0.5, -0.25, 0]
    # one bit of exponent makes even steps
    assert numbers(torch.arange(8), Split(1, 2)).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert [(s.exponent, s.mantissa) for s in splits(4)] == [(1, 2), (2, 1), (3, 0)]
    assert [(s.exponent, s.mantissa) for s in splits(8)] == [(2, 5), (3, 4), (4, 3), (5, 2)]
    with pytest.raises(ValueError, match="e0m3"):
        Split(0, 3)
    with pytest.raises(ValueError, match="inputs=2"):
        SplitBits(4, 2)


@pytest.mark.parametrize("table", sorted(FLOATS))
def test_they_are_those_of_known_formats(table):
    exponent, mantissa, odd = FLOATS[table]
    split = Split(exponent, mantissa)
    known = values(table).float()[: 2 ** (split.bits - 1) - odd]
    assert torch.equal(numbers(torch.arange(len(known)), split), known)


@pytest.mark.parametrize("split", [E2M1, Split(3, 0), Split(1, 2), Split(4, 3), Split(2, 5), Split(5, 2)], ids=str)
def test_nearest_by_brute_force(split):
    grid = numbers(torch.arange(-split.last, split.last + 1), split)
    assert torch.equal(grid, grid.unique()) and float(grid[-1]) == split.top
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) * split.top / 2
    near = rounded(x, split, torch.tensor([1.0]))
    torch.testing.assert_close((near - x).abs(), (grid - x[:, None]).abs().amin(1), rtol=0, atol=1e-6)
    inside = x.clamp(-split.top, split.top)
    low = under(inside, split)
    assert (numbers(low, split) <= inside).all() and (numbers(low + 1, split) >= inside).all()
    ranks = torch.arange(-split.last, split.last + 1)
    assert torch.equal(from_codes(to_codes(ranks, split), split), ranks.int())
    assert torch.equal(nearest(grid, split), ranks.int()) and torch.equal(
        nearest(grid * 100, split)[grid > 0].unique()[-1:], ranks[-1:].int()
    )


def test_ties_and_the_gradient():
    """Half-way between 2 and 3 is 2.5, which goes to the even 2; 5 goes to 4; .25 to 0."""
    x = torch.tensor([2.5, 5.0, 0.25, -9.0], requires_grad=True)
    y = Floated(E2M1, torch.tensor([1.0]))(x)
    assert y.tolist() == [2, 4, 0, -6]
    y.sum().backward()
    assert x.grad.tolist() == [1] * 4


def test_the_search_is_the_best_of_what_it_tried():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)) ** 3
    split, scale = searched(x, x.abs().max(), splits(4), most=1.2, least=0.3, steps=5)
    shares = [1.0, *torch.linspace(1.2, 0.3, 5).tolist()]
    errors = {
        (one, share): float((rounded(x, one, x.abs().max() * share / one.top) - x).square().sum()) for one in splits(4) for share in shares
    }
    assert float((rounded(x, split, scale) - x).square().sum()) == pytest.approx(min(errors.values()), rel=1e-5)
    # numbers on an even grid want even steps
    even = torch.arange(-7.0, 8)
    assert searched(even, even.max(), splits(4), most=1.2, least=0.3, steps=3)[0] == Split(1, 2)


def test_what_is_held():
    g = torch.Generator().manual_seed(2)
    weight, x = torch.randn(6, 10, generator=g), torch.randn(50, 10, generator=g)
    form = held(weight, x)
    # codes of half a byte, one scale each for weights and inputs
    assert form.nbytes == 6 * 5 + 4 + 4 == FPQuant().stored(site(6, 10), SplitBits())
    assert form.inner.split.bits == 4 and form.split.bits == 8
    again = restore(form.describe(), form.tensors())
    assert torch.equal(again.matmul(x), form.matmul(x)) and torch.equal(again.rows(torch.tensor([3])), form.dense()[[3]])
    bare = held(weight, x, SplitBits(8, None))
    assert isinstance(bare, Single) and bare.feed is None and bare.nbytes == 64
    assert float((bare.dense() - weight).norm()) < 0.05 * float(weight.norm())


def test_rounding_is_learned_between_neighbours():
    """2.6 lies between 2 and 3 at .6 of the step, 5 between 4 and 6 at .5 with the even 4 nearest, -0.2 between -.5 and 0; 9 is beyond."""
    weight = torch.tensor([[2.6, 5.0, -0.2, 9.0]])
    form = Single.of((1, 4), E2M1, nearest(weight, E2M1), torch.ones(1))
    soft = FPRound().soften(form, weight)
    assert form.dense().tolist() == [[3, 4, 0, 6]] == soft.harden().dense().tolist()
    torch.testing.assert_close(soft.dense(), torch.tensor([[2.6, 5.0, -0.2, 6.0]]), rtol=0, atol=3e-3)
    with torch.no_grad():
        soft.v.copy_(torch.tensor([[-9.0, 9, -9, -9]]))
    assert soft.harden().dense().tolist() == [[2, 6, -0.5, 4]] == soft.dense().tolist()
    assert soft.penalty(0.1) is None and float(soft.penalty(0.9).detach()) == pytest.approx(0, abs=1e-6)
    assert isinstance(soft.harden(), Single) and soft.harden().nbytes == form.nbytes
