"""Vectors in the span of a basis by hand; expected numbers are literal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from laconic.core.packed import restore
from laconic.core.site import Conv, Linear, Site, TensorId
from laconic.methods.quantize.grid.spans import Moving, Span, Spanned, cut, laid
from laconic.methods.quantize.round.lr2vq import LR2VQ, based, errors, fitted, predicted
from laconic.methods.quantize.train.annealed import Annealed


def site(n: int, m: int) -> Site:
    return Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (n, m))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def held(weight: torch.Tensor, span: Span) -> Spanned:
    (form,) = LR2VQ()(site(*weight.shape), {"weight": weight}, {}, span).hold.values()
    assert isinstance(form, Spanned)
    return form


def test_what_is_held_by_hand():
    """Three vectors of two weights a row, the last half empty; two entries of one number along (1, -1)."""
    table, basis = torch.tensor([[2.0], [-0.5]]), torch.tensor([[1.0, -1.0]])
    form = Spanned.of((2, 5), Span(2, 2, 1), torch.tensor([[0, 1, 0], [1, 1, 1]]), table, basis)
    assert form.dense().tolist() == [[2.0, -2.0, -0.5, 0.5, 2.0], [-0.5, 0.5, -0.5, 0.5, -0.5]]
    assert form.rows(torch.tensor([1, 0])).tolist() == form.dense()[[1, 0]].tolist()
    # a bit a code, the first one lowest; a byte a row, then entries and basis in bf16
    assert form.codes.tolist() == [[0b010], [0b111]] and form.nbytes == 2 + 2 * 2 + 2 * 2
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0, 1.0]])
    assert form.matmul(x).tolist() == [[3.0, -2.0]]
    again = restore(form.describe(), form.tensors())
    assert torch.equal(again.dense(), form.dense())
    assert torch.equal(laid(cut(form.dense(), 2), 2, 5), form.dense()) and cut(form.dense(), 2)[2].tolist() == [2.0, 0.0]


def test_bytes_and_smaller_tables():
    span = Span(9, 64, 4)
    # 64 x 576: 64 vectors a row of 6 bits; 64 entries of 4 numbers, a basis of 4 x 9
    assert Spanned.bytes_of(64, 576, span) == 64 * 48 + 2 * (64 * 4 + 4 * 9)
    # no basis where an entry has all numbers
    assert Spanned.bytes_of(64, 576, Span(9, 64, 9)) == 64 * 48 + 2 * 64 * 9
    # 16 x 3 vectors have 3 entries, two bits; fewer vectors have two
    assert span.fitted(16, 27).entries == 3 and span.fitted(1, 9).entries == 2
    assert Span(9, 65, 4).bits == 7 and Span(9, 2, 4).bits == 1
    for wrong in ({"width": 0}, {"entries": 1}, {"rank": 0}, {"width": 4, "rank": 5}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]}="):
            Span(**wrong)


def test_the_basis_leaves_least_out():
    """Vectors along (3, 4) and a little across: the basis is (0.6, 0.8), and what is left out is what lies across."""
    along, across = torch.tensor([0.6, 0.8]), torch.tensor([-0.8, 0.6])
    vectors = torch.tensor([[1.0], [-2.0], [3.0]]) * along + torch.tensor([[0.1], [0.1], [0.0]]) * across
    found = based(vectors, 1)
    assert abs(float(found[0] @ along)) == pytest.approx(1.0, abs=2e-3)
    both = errors(vectors, Span(2, 3, 1), draw())
    assert both.left == pytest.approx(0.02, abs=1e-3) and both.rounded < 1e-9
    whole = errors(vectors, Span(2, 3, 2), draw())
    assert whole.left == pytest.approx(0.0, abs=1e-5) and whole.whole < 1e-5


def test_errors_add_up():
    vectors = torch.randn(400, 6, generator=draw(1)) @ torch.randn(6, 6, generator=draw(2))
    for rank in (1, 3, 5):
        span = Span(6, 16, rank)
        codes, table, basis = fitted(vectors, span, draw())
        assert basis is not None
        error = float((table[codes] @ basis - vectors).square().sum())
        assert error == pytest.approx(errors(vectors, span, draw()).whole, rel=0.02)


def test_the_rank_that_is_predicted():
    """Vectors of two directions of eight: two numbers are enough, and more of them leave room for fewer entries in as many bytes."""
    vectors = torch.randn(600, 2, generator=draw()) @ torch.linalg.qr(torch.randn(8, 8, generator=draw(3))).Q[:2]
    vectors = vectors + 0.01 * torch.randn(600, 8, generator=draw(4))
    spans = [Span(8, 64 // rank, rank) for rank in (1, 2, 4, 8)]
    assert predicted(vectors, spans, draw()).rank == 2


def test_a_matrix_of_few_rows_by_hand():
    """Two kinds of vectors, two entries: nothing is lost, in a basis of one direction or in none."""
    weight = torch.tensor([[1.0, -1.0, 2.0, -2.0], [2.0, -2.0, 1.0, -1.0]]).repeat(8, 1)
    for rank in (1, 2):
        form = held(weight, Span(2, 2, rank))
        torch.testing.assert_close(form.dense(), weight, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("spoil", ["dead", "tiny", "outlier", "ragged", "one row", "narrow"])
def test_nothing_breaks_on_poor_weights(spoil):
    n, m = (1, 40) if spoil == "one row" else (6, 3) if spoil == "narrow" else (12, 37)
    weight = torch.randn(n, m, generator=draw(5))
    weight = weight * {"dead": 0.0, "tiny": 1e-30}.get(spoil, 1.0)
    if spoil == "outlier":
        weight[0, 5] = 1e4
    span = Span(9, 8, 3)
    form = held(weight, span)
    assert torch.isfinite(form.dense()).all() and form.nbytes == Spanned.bytes_of(n, m, span)
    x = torch.randn(2, m, generator=draw(6))
    torch.testing.assert_close(form.matmul(x), F.linear(x, form.dense()))
    for soft in (form.soften(weight), Annealed().soften(form, weight), form.coded()):
        assert soft is not None
        assert torch.isfinite(soft.dense()).all()
        assert all(torch.equal(soft.harden().tensors()[name], tensor) for name, tensor in form.tensors().items())
    if spoil == "dead":
        assert not form.dense().any()


def test_a_convolution_is_cut_along_its_kernels():
    where = Site("layer", Conv(), {"weight": TensorId("layer.weight")}, (8, 4, 3, 3))
    weight = torch.randn(8, 4, 3, 3, generator=draw(7))
    (form,) = LR2VQ()(where, {"weight": weight}, {}, Span(9, 4, 2)).hold.values()
    assert form.dense().shape == weight.shape and form.plain().shape == (8, 4)


def test_vectors_cool_down():
    """Positions 0.9 and -1 beside entries 1 and -1: hot, each is a mixture; cold, it is its entry. Before that they are themselves."""
    form = Spanned.of((1, 2), Span(1, 2, 1), torch.tensor([[0, 1]]), torch.tensor([[1.0], [-1.0]]), None)
    target = torch.tensor([[0.9, -1.0]])
    soft = Moving(form, target, warm=0.5, heat=(1.0, 0.01))
    torch.testing.assert_close(soft.dense(), target)
    assert torch.equal(soft.harden().dense(), torch.tensor([[1.0, -1.0]]))
    soft.penalty(0.25)
    torch.testing.assert_close(soft.dense(), target)
    # entries are found anew: those of the positions themselves
    soft.penalty(0.5)
    torch.testing.assert_close(soft.harden().dense(), target, rtol=0.01, atol=0.01)
    mixed = Moving(form, target, warm=0.0, heat=(1.0, 0.01))
    # the mean squared distance to the nearest entry is (0.01 + 0) / 2
    assert float(mixed.spread) == pytest.approx(0.005, rel=0.05)
    mixed.spread.fill_(4.0)
    # weights of 1 and -1 at 0.9, t = 4: softmax(-0.01 / 4, -3.61 / 4)
    a = torch.softmax(torch.tensor([-0.01 / 4, -3.61 / 4]), 0)
    assert float(mixed.dense().detach()[0, 0]) == pytest.approx(float(a[0] - a[1]), abs=0.03)
    mixed.penalty(0.999)
    assert float(mixed.dense().detach()[0, 0]) == pytest.approx(1.0, abs=1e-3)
    mixed.dense().sum().backward()
    assert mixed.position.grad is not None and torch.isfinite(mixed.position.grad).all()
    for wrong in ({"warm": 1.0}, {"heat": (0.1, 1.0)}, {"heat": (1.0, 0.0)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Annealed(**wrong)


def test_codes_are_exchanged_by_what_entries_stand_for():
    form = Spanned.of((1, 4), Span(2, 2, 1), torch.tensor([[0, 1]]), torch.tensor([[2.0], [-0.5]]), torch.tensor([[1.0, -1.0]]))
    coded = form.coded()
    assert coded.groups(form.dense()).tolist() == [[2.0, -2.0], [-0.5, 0.5]]
    codes, weights = coded.nearest(torch.tensor([1]), torch.tensor([[1.5, -1.0]]))
    assert codes.tolist() == [0] and weights.tolist() == [[2.0, -2.0]]
    coded.exchange(torch.tensor([1]), codes)
    assert coded.harden().dense().tolist() == [[2.0, -2.0, 2.0, -2.0]]
