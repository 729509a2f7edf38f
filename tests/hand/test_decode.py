"""Decoders by hand: the rule of what stands, the turn of positions, the adapter, and a draft over chains whose probabilities are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from laconic.core.decoder import Answer, Body, Draw, Stack
from laconic.core.errors import UserError
from laconic.kernels.rotary import rotated
from laconic.kernels.speculation import kept, residual, verdict
from laconic.methods.decode.draft.kangaroo import CAUSAL, Adapter, Kangaroo
from laconic.methods.decode.sample.ancestral import Ancestral

# what the model says after each of three tokens, and what the draft thinks
TRUTH = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
GUESS = torch.tensor([[0.2, 0.2, 0.6], [0.1, 0.7, 0.2], [0.05, 0.9, 0.05]])


def test_what_stands_by_hand():
    p, q = TRUTH[0], GUESS[0]
    # min(1, 0.5 / 0.2), min(1, 0.3 / 0.2), 0.2 / 0.6
    torch.testing.assert_close(kept(p, q), torch.tensor([1.0, 1.0, 1 / 3]))
    # (0.3, 0.1, -0.4) -> 0.3 / 0.4, 0.1 / 0.4, 0
    torch.testing.assert_close(residual(p, q), torch.tensor([0.75, 0.25, 0.0]))
    # what cannot be drawn cannot stand, and one distribution refuses nothing
    assert kept(p, torch.tensor([0.0, 0.0, 1.0])).tolist() == [0.0, 0.0, pytest.approx(0.2)]
    assert torch.equal(residual(p, p), p)


def test_rejection_gives_the_judges_distribution_exactly():
    """Over a small vocabulary the chance of each token can be added up: drafted and kept, or drawn in place of what was refused."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        p, q = (torch.rand(5, generator=g, dtype=torch.float64) for _ in range(2))
        p, q = (x * (torch.rand(5, generator=g) > 0.3) + 1e-9 * (x == x.max()) for x in (p, q))
        p, q = p / p.sum(), q / q.sum()
        stands = q * kept(p, q)
        torch.testing.assert_close(stands + (1 - stands.sum()) * residual(p, q), p, rtol=0, atol=1e-12)


def test_greedy_is_equality_and_draws_nothing():
    sure = Draw()
    odds = sure.odds(torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 0.0], [0.0, 0.0, 9.0]]))
    # of equals the first
    assert odds.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    guess = [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])]
    assert verdict([1, 0], guess, odds, sure) == (2, 2)
    assert verdict([0, 0], [guess[1]] * 2, odds, sure) == (0, 1)
    assert verdict([1, 1], [guess[0]] * 2, odds, sure) == (1, 0)
    assert verdict([], [], odds[2:], sure) == (0, 2)


def test_positions_by_hand():
    x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]]])
    turned = rotated(x, torch.tensor([[0, 1, 2]]))[0, 0]
    expected = [[1.0, 0.0], [math.cos(1), math.sin(1)], [-2 * math.sin(2), 2 * math.cos(2)]]
    torch.testing.assert_close(turned, torch.tensor(expected))
    # the second pair of four turns a hundredth as fast; products depend on distance alone
    slow = rotated(torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]]), torch.tensor([[100]]))[0, 0, 0]
    torch.testing.assert_close(slow, torch.tensor([0.0, math.cos(1), 0.0, math.sin(1)]))
    a, b = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    near, far = ((rotated(a, torch.tensor([[i]])) * rotated(b, torch.tensor([[i + 5]]))).sum() for i in (0, 40))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_the_adapter_by_hand():
    adapter = Adapter(2, 1)
    with torch.no_grad():
        for linear in (adapter.q, adapter.k, adapter.o):
            linear.weight.copy_(torch.eye(2))
        adapter.v.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    # one token sees itself: (3, 4) / sqrt(12.5) = (0.848528, 1.131371), turned round (1.131371, 0.848528), added (4.131371, 4.848528),
    # over their root mean square 4.504245
    with torch.no_grad():
        found = adapter(torch.tensor([[[3.0, 4.0]]]), 7, CAUSAL)
    torch.testing.assert_close(found, torch.tensor([[[0.917217, 1.076436]]]), rtol=1e-5, atol=1e-5)
    # one attention and two norms
    (part,) = Kangaroo().place(Body(8, 256, 8), None).place.values()
    assert sum(p.numel() for p in part.parameters()) == 4 * 256**2 + 2 * 256
    # it begins as the early exit alone
    (part,) = Kangaroo().place(Body(8, 6, 8), torch.Generator().manual_seed(0)).place.values()
    hidden = torch.randn(2, 5, 6)
    torch.testing.assert_close(part(hidden, 0, CAUSAL), hidden / hidden.square().mean(-1, keepdim=True).add(1e-6).sqrt())
    # 6 columns do not split into 8 heads of pairs, but into 3
    assert part.heads == 3


class Chain(Stack):
    """A model of three tokens whose next token hangs on the last alone; the draft is another such chain."""

    def __init__(self) -> None:
        self.length = self.layer_passes = self.part_passes = 0
        self.parts = {"kangaroo": lambda hidden, first, mix: hidden}

    def rise(self, tokens: Tensor, last: int) -> Tensor:
        return nn.functional.one_hot(tokens, 3).float()

    def answer(self, tokens: Tensor, hidden: Tensor | None = None, first: int = 0, keep: int | None = None) -> Answer:
        tokens = tokens[:, -(keep or 0) :]
        return Answer(TRUTH[tokens].log(), TRUTH[tokens])

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ GUESS.log()

    def mix(self, part: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise NotImplementedError

    def settle(self, count: int) -> None:
        self.length += count

    def fork(self, index: Tensor) -> None:
        raise NotImplementedError


def test_a_draft_ends_behind_the_first_unsure_token():
    # greedy draft from 1: 1 (0.7 sure) for ever; from 0: 2 (0.6), from 2: 1 (0.9)
    rounds = list(Kangaroo(eta=0.65, most=4)(Chain(), torch.tensor([[1]]), limit=12, draw=Draw()))
    assert [one.drafted for one in rounds] == [0, 4, 4, 0]
    assert torch.cat([one.tokens for one in rounds], 1).tolist() == [[1] * 12]
    rounds = list(Kangaroo(eta=0.75, most=4)(Chain(), torch.tensor([[1]]), limit=12, draw=Draw()))
    assert [one.drafted for one in rounds] == [0, 1, 1, 1, 1, 1, 0]
    # 0 says 2 at 0.6, which is refused: the model says 0
    rounds = list(Kangaroo(eta=0.65, most=4)(Chain(), torch.tensor([[0]]), limit=3, draw=Draw()))
    assert [(one.tokens.tolist(), one.drafted, one.accepted) for one in rounds] == [([[0]], 0, 0), ([[0]], 1, 0), ([[0]], 0, 0)]
    # an end among the accepted ends the text
    found = list(Kangaroo(eta=0, most=4)(Chain(), torch.tensor([[2]]), limit=9, draw=Draw(), ends=frozenset({2})))
    assert torch.cat([one.tokens for one in found], 1).tolist() == [[2]]


@pytest.mark.parametrize("decoder", [Ancestral(), Kangaroo(eta=0.65, most=3), Kangaroo(eta=0, most=2)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_texts_have_the_models_distribution(decoder, temperature):
    """All 81 texts of four tokens, expected against drawn: chi-square, at a level of one in a thousand for a fixed seed."""
    draw, count = Draw(temperature, torch.Generator().manual_seed(1)), 800
    sharp = (TRUTH.log() / temperature).softmax(-1)
    seen = dict.fromkeys(itertools.product(range(3), repeat=4), 0)
    for _ in range(count):
        rounds = decoder(Chain(), torch.tensor([[0]]), limit=4, draw=draw)
        seen[tuple(torch.cat([one.tokens for one in rounds], 1)[0].tolist())] += 1
    statistic, cells, rest = 0.0, 0, [0.0, 0]
    for text, found in seen.items():
        chance = math.prod(float(sharp[a, b]) for a, b in itertools.pairwise((0, *text)))
        if chance * count < 5:
            rest = [rest[0] + chance * count, rest[1] + found]
            continue
        statistic, cells = statistic + (found - chance * count) ** 2 / (chance * count), cells + 1
    statistic += (rest[1] - rest[0]) ** 2 / max(rest[0], 1e-9)
    # Wilson and Hilferty's approximation of the quantile at 0.999, cells degrees of freedom
    bound = cells * (1 - 2 / (9 * cells) + 3.09 * math.sqrt(2 / (9 * cells))) ** 3
    assert statistic < bound
    # drafts taken as they come are far from it
    wrong = sum(abs(n / count - math.prod(float(GUESS[a, b]) for a, b in itertools.pairwise((0, *text)))) for text, n in seen.items())
    assert wrong > 0.5


def test_what_cannot_be_decoded_is_refused():
    with pytest.raises(UserError, match="one text at a time"):
        next(iter(Kangaroo()(Chain(), torch.zeros(2, 3, dtype=torch.long), limit=4, draw=Draw())))
    with pytest.raises(UserError, match="no layer to judge"):
        Kangaroo(tap=8).place(Body(8, 256, 8), None)
    with pytest.raises(ValueError, match="probability"):
        Kangaroo(eta=1.5)
