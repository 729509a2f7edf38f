"""BitStack and its order on matrices small enough for pencil and paper."""

from __future__ import annotations

import pytest
import torch

from laconic.core.menu import Damage
from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Norms, Seen
from laconic.methods.nest.bits.bitstack import BitStack, Stack, factor_of
from laconic.methods.nest.bits.signed import Signed
from laconic.methods.nest.order.rounds import Rounds


def site(n: int, m: int) -> Site:
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m))


def held(weight: torch.Tensor, norms: torch.Tensor, level: Stack):
    (form,) = BitStack()(site(*weight.shape), {"weight": weight}, {Norms(): norms}, level).hold.values()
    return form


def test_norms_are_means_over_sequences():
    norms = Norms()
    # two sequences of two tokens: norms 5 and 0, then 0 and 1
    x = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    state = norms.update(norms.init(site(1, 2)), Seen(x=x, sequences=2))
    assert norms.finish(state).tolist() == [2.5, 0.5]
    # as one sequence it is another number: 5 and 1
    assert norms.finish(norms.update(norms.init(site(1, 2)), Seen(x=x))).tolist() == [5.0, 1.0]
    masked = torch.tensor([True, False, True, True])
    assert norms.finish(norms.update(norms.init(site(1, 2)), Seen(x=x, mask=masked, sequences=2))).tolist() == [1.5, 0.5]


def test_two_blocks_by_hand():
    # s = (1, 4): the scaled matrix is [[1, -.5], [.5, -1]], its magnitudes [[1, .5], [.5, 1]] have singular values 1.5 and .5 along
    # (1, 1) and (1, -1), so rank 1 is .75 everywhere; what is left is [[.25, .25], [-.25, -.25]], of which rank 1 is all
    weight = torch.tensor([[1.0, -0.125], [0.5, -0.25]])
    norms = torch.tensor([1.0, 4.0]) - 1e-3
    form = held(weight, norms, Stack(2, 1))
    assert form.scale.tolist() == [1.0, 0.25]
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(form.first(1).dense(), torch.tensor([[0.75, -0.1875], [0.75, -0.1875]]), **close)
    torch.testing.assert_close(form.inner.terms[1].dense(), torch.tensor([[0.25, 0.25], [-0.25, -0.25]]), **close)
    torch.testing.assert_close(form.dense(), weight, **close)
    # signs: + - / + - in bits 0 and 1, then + + / - -; a row of signs fills a word of 16 bits
    assert [block.sign.tolist() for block in form.inner.terms] == [[[1, 0], [1, 0]], [[3, 0], [0, 0]]]
    # two words, two factors of 2 x 1 in fp16; two bf16 factors of the columns
    assert form.inner.terms[0].nbytes == 2 * 2 + 2 * (2 + 2) == Signed.bytes_of(2, 2, 1)
    assert form.nbytes == 2 * 12 + 2 * 2 == BitStack().stored(site(2, 2), Stack(2, 1))


def test_a_block_makes_up_for_what_fp16_lost_before_it():
    weight = torch.full((3, 5), 1 / 3)
    errors = [float((held(weight, torch.ones(5), Stack(count, 1)).dense() - weight).abs().amax()) for count in (1, 2, 3)]
    assert errors[0] > 1e-5 > errors[1] >= errors[2]
    assert errors[2] < 1e-9


def test_scaling_changes_no_block():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    norms = torch.rand(9, generator=torch.Generator().manual_seed(1)) * 10 - 1e-3
    one, other = held(weight, norms, Stack(3, 2)), held(weight * 2.0**20, norms, Stack(3, 2))
    assert torch.equal(one.dense() * 2.0**20, other.dense())
    assert torch.equal(one.inner.terms[0].left, other.inner.terms[0].left)
    # dead channels have s = 1e-3, an empty matrix is left as it is
    assert factor_of(torch.ones(2, 2), torch.tensor([1.0, 0.0]) - torch.tensor([1e-3, 0.0])).tolist() == [1.0, 1000.0]
    assert torch.equal(held(torch.zeros(2, 3), torch.zeros(3), Stack(2, 1)).dense(), torch.zeros(2, 3))


def test_rank_is_the_papers_where_factors_are_light():
    # a quarter of 4096^2 bits of signs is 512 KiB; a rank costs 2 * 8192 bytes
    assert Stack().rank_of(4096, 4096) == 16
    assert Stack(share=1e9).rank_of(256, 256) == 16
    assert [Stack().rank_of(*shape) for shape in ((256, 256), (768, 256), (128, 256), (3, 5))] == [2, 3, 1, 1]
    with pytest.raises(ValueError, match="at least one block"):
        Stack(blocks=0)


def test_rounds_by_hand():
    asked = []

    def trial(counts, names):
        asked.append((dict(counts), list(names)))
        worth = {"a": 2.0, "b": 1.0, "c": 3.0}
        return [Damage(worth[name], "nats/token", "here") for name in names]

    order = Rounds()({"a": (5, 1, 1), "b": (3, 1), "c": (9,), "d": (7,)}, trial)
    # round 1: b is the better of a and b; round 2 has a alone; c and d have one part
    assert order == ["b", "a", "a"]
    assert asked == [({"a": 1, "b": 1, "c": 1, "d": 1}, ["a", "b"]), ({"a": 2, "b": 2, "c": 1, "d": 1}, ["a"])]
    assert Rounds()({"c": (9,)}, trial) == []
