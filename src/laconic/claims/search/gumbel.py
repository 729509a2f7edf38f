"""Claims of Gumbel top-k: its draws are those of sampling one after another without replacement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, judged, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.menu import Budget
from laconic.methods.search.sample.gumbel import Gumbel
from laconic.selection import menu_of

WEIGHTS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
TAKEN = 3
Draw = Callable[[Tensor, torch.Generator], frozenset[int]]


def by_search(worth: Tensor, generator: torch.Generator) -> frozenset[int]:
    """What the search takes."""
    plan = Gumbel()(menu_of([1] * len(worth), worth), Budget(examples=TAKEN), judge=None, rng=generator, log=lambda _: None)
    return frozenset(int(i) for row in plan.rows if row.method == "take" for i in row.covers)


def by_even_noise(worth: Tensor, generator: torch.Generator) -> frozenset[int]:
    """The stand-in: noise of the same spread from a uniform distribution."""
    noise = torch.rand(len(worth), generator=generator, dtype=torch.float64) * math.pi * math.sqrt(2)
    return frozenset((worth + noise).topk(TAKEN).indices.tolist())


def chances() -> dict[frozenset[int], float]:
    """Of each set of TAKEN things, drawn one after another by weight without replacement: over all orders."""
    found: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(len(WEIGHTS)), TAKEN):
        left, chance = sum(WEIGHTS), 1.0
        for i in order:
            chance *= WEIGHTS[i] / left
            left -= WEIGHTS[i]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + chance
    return found


def _fits(draw: Draw, seeds: Sequence[int], lab: Lab) -> Verdict:
    seeds = lab.draws(seeds)
    expected = chances()
    number = 4_000 if lab.quick else 40_000
    worth = torch.tensor(WEIGHTS, dtype=torch.float64).log()
    statistics = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        count = dict.fromkeys(expected, 0)
        for _ in range(number):
            count[draw(worth, generator)] += 1
        statistics.append(sum((count[s] - number * p) ** 2 / (number * p) for s, p in expected.items()))
    # chi-squared of k degrees of freedom: mean k, variance 2 k; the bound is passed by chance once in some 10,000 runs
    free = len(expected) - 1
    bound = free + 4.5 * math.sqrt(2 * free)
    wrong = [f"draw {s}: chi-squared {x:.1f} is above {bound:.1f}" for s, x in zip(seeds, statistics, strict=True) if x > bound]
    numbers = {"chi-squared of the sets drawn": spread(statistics, f"of {free} degrees of freedom"), "bound": Measurement(bound, "", 1)}
    return judged(wrong, numbers)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="The k largest of log weights with Gumbel noise are k draws one after another without replacement, each by weight.",
        where=Paper("Kool et al.", 2019, "arXiv:1903.06059", "section 2.3 and appendix A"),
        scale="all 20 sets of 3 of 6 things, 40,000 draws, 3 seeds",
        check=partial(_fits, by_search, SEEDS),
        broken=partial(_fits, by_even_noise, ONE),
    ),
)
