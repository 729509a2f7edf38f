"""Divergences, intervals and paired tests against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from laconic.kernels import divergence


def logits(*shares: float) -> torch.Tensor:
    """Logits of given probabilities, moved by 3, which a softmax does not see."""
    return torch.tensor(shares, dtype=torch.float64).log() + 3


def test_kl_of_two_coins() -> None:
    # 1/2 ln(1/2 : 1/4) + 1/2 ln(1/2 : 3/4) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3
    assert divergence.kl(logits(0.5, 0.5), logits(0.25, 0.75)).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    # the other way round: 1/4 ln 1/2 + 3/4 ln 3/2
    assert divergence.kl(logits(0.25, 0.75), logits(0.5, 0.5)).item() == pytest.approx(0.130812035941137, abs=1e-12)


def test_kl_of_a_model_with_itself_is_exactly_zero() -> None:
    x = torch.randn(50, 331, generator=torch.Generator().manual_seed(3)) * 20
    assert bool((divergence.kl(x, x) == 0).all())
    assert bool((divergence.kl(x, x + 5) < 1e-9).all())
    assert bool((divergence.kl(x, torch.randn(50, 331)) > 0).all())


def test_kl_at_the_edges() -> None:
    inf = math.inf
    # an outcome that both rule out counts nothing; one that only the second rules out costs everything
    p, q = torch.tensor([0.0, 0.0, -inf]), torch.tensor([0.0, 0.0, -inf])
    assert divergence.kl(p, q).item() == 0
    assert divergence.kl(torch.zeros(3), q).item() == inf
    assert divergence.kl(q, torch.zeros(3)).item() == pytest.approx(math.log(1.5))
    assert math.isnan(divergence.kl(torch.tensor([0.0, math.nan]), torch.zeros(2)).item())
    # fp32 logits a hair apart: second order, (delta^2)/8 for two even outcomes, far below what fp32 sums resolve
    assert divergence.kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 2.0**-12])).item() == pytest.approx(2.0**-27, rel=1e-6)


def test_loss_and_agreement() -> None:
    rows = torch.stack([logits(0.5, 0.25, 0.25), logits(0.1, 0.8, 0.1)])
    assert divergence.nll(rows, torch.tensor([1, 1])).tolist() == pytest.approx([math.log(4), -math.log(0.8)])
    assert divergence.agree(rows, rows.flip(0)).tolist() == [False, False]
    assert divergence.agree(rows, rows * 2).tolist() == [True, True]


def test_pointwise_in_pieces_is_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    p, q, target = torch.randn(37, 11, generator=g), torch.randn(37, 11, generator=g), torch.randint(11, (37,), generator=g)
    whole, pieces = divergence.pointwise(p, q, target), divergence.pointwise(p, q, target, elements=25)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert torch.equal(whole.kl, divergence.kl(p, q)) and torch.equal(whole.top1, divergence.agree(p, q))
    assert torch.equal(whole.nll_p, divergence.nll(p, target)) and torch.equal(whole.nll_q, divergence.nll(q, target))
    assert divergence.pointwise(p, q).nll_p.numel() == 0


def test_quantile_is_the_nearest_rank() -> None:
    values = torch.tensor([[5.0, 1.0], [4.0, 2.0], [3.0, 9.0]])
    assert [divergence.quantile(values, q) for q in (0.01, 1 / 6, 0.5, 0.51, 0.9, 1.0)] == [1, 1, 3, 4, 9, 9]
    # 0.95 of 20 is 19 and nothing above, although 0.95 * 20 is not 19 in binary
    assert divergence.quantile(torch.arange(1.0, 21.0), 0.95) == 19


def test_bootstrap_of_the_mean() -> None:
    # two values: a resample's mean is 0, 1/2 or 1 with shares 1/4, 1/2, 1/4, so the ends are 0 and 1
    assert divergence.bootstrap_mean(torch.tensor([0.0, 1.0])) == (0.0, 1.0)
    assert divergence.bootstrap_mean(torch.full((7,), 0.25)) == (0.25, 0.25)
    # many values: the ends of a normal, mean -+ 1.96 deviation / sqrt(n)
    x = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = divergence.bootstrap_mean(x)
    half = 1.96 * x.std().item() / 20
    assert low == pytest.approx(x.mean().item() - half, abs=0.01) and high == pytest.approx(x.mean().item() + half, abs=0.01)
    assert divergence.bootstrap_mean(x, seed=4) == divergence.bootstrap_mean(x, seed=4) != divergence.bootstrap_mean(x, seed=5)


def test_bootstrap_of_quantiles_draws_rows() -> None:
    # two rows of three: the median of a resample is 2 (both rows), 1 (first twice) or 9 (second twice)
    values = torch.tensor([[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    (median,) = divergence.bootstrap_quantiles(values, [0.5])
    assert median == (1.0, 9.0)
    # against the plain way: draw rows, sort, take the rank
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(2)).double()
    found = divergence.bootstrap_quantiles(x, [0.5, 0.95], resamples=300)
    g = torch.Generator().manual_seed(0)
    plain = [x[torch.randint(9, (9,), generator=g)] for _ in range(300)]
    for interval, q in zip(found, (0.5, 0.95), strict=True):
        values = torch.tensor([divergence.quantile(one, q) for one in plain], dtype=torch.float64)
        assert interval == (divergence.quantile(values, 0.025), divergence.quantile(values, 0.975))


def test_wilson() -> None:
    # 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10), z2 = 3.8415
    assert divergence.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    # all of n: 1 / (1 + z2/n) to 1
    assert divergence.wilson(100, 100) == pytest.approx((100 / 103.841459, 1.0), abs=1e-7)
    assert divergence.wilson(0, 100).low == 0.0


def test_sign_flip() -> None:
    # 1, 2, 3: of the 8 patterns only +++ and --- reach a sum of 6
    assert divergence.sign_flip(torch.tensor([1.0, 2.0, 3.0])) == (0.25, 8, True)
    # 1, 2, -3: any pattern reaches 0
    assert divergence.sign_flip(torch.tensor([1.0, 2.0, -3.0])).value == 1.0
    assert divergence.sign_flip(torch.zeros(40)).value == 1.0
    # eight equal differences: 2 of 256, although sums of 0.1 are not exact
    assert divergence.sign_flip(torch.full((8,), 0.1)).value == 2 / 256
    drawn = divergence.sign_flip(torch.cat([torch.ones(12), -torch.ones(8)]), draws=50_000)
    # 20 signs, at least 12 alike: 2 * P(heads <= 8) = 0.503445
    assert drawn.value == pytest.approx(0.503445, abs=0.01) and not drawn.exact
    assert 0 < divergence.sign_flip(torch.ones(60), draws=1000).value < 0.002


def test_mcnemar() -> None:
    first = torch.tensor([True] * 6 + [False] + [True] * 9)
    second = torch.tensor([False] * 6 + [True] + [True] * 9)
    # 7 samples on which one alone is right, 6 against 1: 2 * (1 + 7) / 2^7
    assert divergence.mcnemar(first, second) == (2 * 8 / 128, 7, True)
    assert divergence.mcnemar(first, first).value == 1.0
    # 3 against 3: twice the tail is above 1
    assert divergence.mcnemar(torch.tensor([True] * 3 + [False] * 3), torch.tensor([False] * 3 + [True] * 3)).value == 1.0
    many = torch.arange(4000) < 2100
    assert 0 < divergence.mcnemar(many, ~many).value < 0.01
