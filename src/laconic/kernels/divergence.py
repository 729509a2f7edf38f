"""How far one model's predictions are from another's: KL, losses, agreement, and the intervals and paired tests that go with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# two-sided 95 % of a normal
_Z95 = 1.959963984540054


class Pointwise(NamedTuple):
    """Of each prediction, fp64: kl in nats, both losses in nats (empty without targets), and whether the first choices agree (bool)."""

    kl: Tensor
    nll_p: Tensor
    nll_q: Tensor
    top1: Tensor


def _log_softmax(logits: Tensor) -> Tensor:
    # fp32 logits, fp64 sums: the first-order terms of a small KL cancel, and fp32 would leave noise of 1e-7
    return F.log_softmax(logits.double(), dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # an outcome that p rules out counts nothing, whatever q says of it; NaN is not zero and stays
    terms = torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q))
    total = terms.sum(-1)
    # below zero only by rounding; NaN stays NaN
    return torch.where(total < 0, torch.zeros_like(total), total)


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) in nats. logits (..., v) of each -> (...) fp64, at least 0, exactly 0 for equal logits, NaN where a logit is NaN."""
    return _kl(_log_softmax(logits_p), _log_softmax(logits_q))


def nll(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log likelihood in nats. logits (..., v), target (...) int64 -> (...) fp64."""
    return -_log_softmax(logits).gather(-1, target[..., None])[..., 0]


def agree(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Whether both put the same outcome first. logits (..., v) of each -> (...) bool."""
    return logits_p.argmax(-1) == logits_q.argmax(-1)


def pointwise(logits_p: Tensor, logits_q: Tensor, target: Tensor | None = None, *, elements: int = 1 << 22) -> Pointwise:
    """kl, nll and agree of logits (n, v) at once, `elements` logits at a time, so that the fp64 copies stay small. target (n,) int64."""
    n, v = logits_p.shape
    step = max(1, elements // v)
    parts: list[Pointwise] = []
    for i in range(0, n, step):
        log_p, log_q = _log_softmax(logits_p[i : i + step]), _log_softmax(logits_q[i : i + step])
        if target is None:
            loss_p = loss_q = log_p.new_empty(0)
        else:
            t = target[i : i + step, None]
            loss_p, loss_q = -log_p.gather(-1, t)[:, 0], -log_q.gather(-1, t)[:, 0]
        parts.append(Pointwise(_kl(log_p, log_q), loss_p, loss_q, agree(logits_p[i : i + step], logits_q[i : i + step])))
    return Pointwise(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Interval(NamedTuple):
    """Ends of a two-sided 95 % interval."""

    low: float
    high: float


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rank(q: float, n: int) -> int:
    # a hair below the product, so that 0.95 * 20 is rank 19 and not 20
    return min(n, max(1, math.ceil(q * n - 1e-9)))


def quantile(values: Tensor, q: float) -> float:
    """Nearest-rank quantile: the least value that at least a share q of the values do not exceed. values any shape, 0 < q <= 1."""
    flat = values.reshape(-1)
    return float(flat.kthvalue(_rank(q, flat.shape[0])).values)


def bootstrap_mean(values: Tensor, *, seed: int = 0, resamples: int = 10_000) -> Interval:
    """95 % percentile bootstrap of the mean over independent values (n,), one for each sequence."""
    n = values.shape[0]
    values = values.double()
    generator = _generator(seed)
    means = []
    step = max(1, (1 << 20) // n)
    for i in range(0, resamples, step):
        index = torch.randint(n, (min(step, resamples - i), n), generator=generator)
        means.append(values[index].mean(1))
    found = torch.cat(means)
    return Interval(quantile(found, 0.025), quantile(found, 0.975))


def bootstrap_quantiles(values: Tensor, qs: Sequence[float], *, seed: int = 0, resamples: int = 1000) -> tuple[Interval, ...]:
    """95 % percentile bootstrap of nearest-rank quantiles of values (s, t); whole rows are drawn, since values of a row depend on one
    another. One interval for each q."""
    s, t = values.shape
    ordered, at = values.double().reshape(-1).sort()
    row = (at // t).numpy()
    drawn = torch.randint(s, (resamples, s), generator=_generator(seed)).numpy()
    ranks = np.array([_rank(q, s * t) for q in qs])
    found = torch.empty(resamples, len(qs), dtype=torch.float64)
    for i in range(resamples):
        # numpy, because thousands of short operations gain nothing from threads and lose much to their waiting
        times = np.bincount(drawn[i], minlength=s)
        # how many drawn values do not exceed each of the ordered ones
        below = np.cumsum(times[row])
        found[i] = ordered[torch.from_numpy(np.searchsorted(below, ranks))]
    return tuple(Interval(quantile(found[:, k], 0.025), quantile(found[:, k], 0.975)) for k in range(len(qs)))


def wilson(hits: int, n: int) -> Interval:
    """95 % Wilson interval of a share from `hits` of n independent trials."""
    share, z2 = hits / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # the ends at no hit and at nothing but hits are exact, whatever rounding says
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half)


class PValue(NamedTuple):
    """A two-sided p-value; `draws` is how many sign patterns it rests on, `exact` whether these are all there are."""

    value: float
    draws: int
    exact: bool


def sign_flip(differences: Tensor, *, seed: int = 0, draws: int = 100_000) -> PValue:
    """Paired permutation test that the mean difference is 0: under the null each difference (n,) may as well have the other sign.

    All 2^n patterns up to n = 16; beyond, `draws` random ones, the observed one counted too, so that p is never 0."""
    d = differences.double().reshape(-1)
    n = d.shape[0]
    # patterns that only reorder the same sum must count as equal
    seen = abs(float(d.sum())) - 1e-12 * float(d.abs().sum())
    if n <= 16:
        codes = torch.arange(1 << n)[:, None] >> torch.arange(n)[None]
        sums = (1.0 - 2.0 * (codes & 1).double()) @ d
        return PValue(float((sums.abs() >= seen).double().mean()), 1 << n, True)
    generator = _generator(seed)
    count = 0
    step = max(1, (1 << 21) // n)
    for i in range(0, draws, step):
        signs = torch.randint(2, (min(step, draws - i), n), generator=generator).double().mul_(2).sub_(1)
        count += int(((signs @ d).abs() >= seen).sum())
    return PValue((count + 1) / (draws + 1), draws, False)


def mcnemar(first: Tensor, second: Tensor) -> PValue:
    """Exact McNemar test of two classifiers on the same samples. first, second (n,) bool, true where right. Only samples on which one
    alone is right count; under the null each of them falls to either side with probability one half."""
    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    n, least = only_first + only_second, min(only_first, only_second)
    term, tail = 1, 1
    for i in range(1, least + 1):
        term = term * (n - i + 1) // i
        tail += term
    return PValue(min(1.0, 2 * tail / 2**n), n, True)
