"""Claims of magnitude pruning: what is small matters little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import SEEDS, Bench, duel, judged, on, seen
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.score import Score, Unit
from laconic.core.statistic import Statistic
from laconic.methods.prune.cut.drop import Drop, Sparsity
from laconic.methods.prune.score.magnitude import Magnitude


@dataclass(frozen=True)
class Smallest(Score):
    """The stand-in: what is small stays."""

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        return -unit.weight.abs()


@dataclass(frozen=True)
class Random(Score):
    """Pruning at random; the name of the site goes into the seed, so that no two sites lose the same places."""

    seed: int

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        number = sum(ord(letter) * (i + 1) for i, letter in enumerate(unit.site.name))
        return torch.rand(unit.weight.shape, generator=torch.Generator().manual_seed(1_000_000 * self.seed + number))


def _low(bench: Bench, score: Score) -> Verdict:
    numbers: dict[str, Measurement] = {}
    wrong = []
    n = bench.certify.inputs.shape[0]
    for share, bound in ((0.1, 0.01), (0.2, 0.05)):
        found = seen(bench, Drop(score), Sparsity(1 - share))
        numbers[f"{share:.0%} pruned: perplexity gap"] = Measurement(found.gap, "share", n)
        numbers[f"{share:.0%} pruned: KL"] = Measurement(found.kl, "nats/token", n)
        if found.gap > bound:
            wrong.append(f"{share:.0%} pruned raise the perplexity by {found.gap:.1%}, more than {bound:.0%}")
    return judged(wrong, numbers)


def _half(bench: Bench, score: Score) -> Verdict:
    ours = seen(bench, Drop(score), Sparsity(0.5))
    theirs = [seen(bench, Drop(Random(seed)), Sparsity(0.5)) for seed in SEEDS]
    return judged(*duel("50 % pruned", [ours], theirs, names=("magnitude", "random")))


def _on(name: str, check: str, score: Score, lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _low(bench, score) if check == "low" else _half(bench, score))


PAPER = Paper("Han et al.", 2015, "arXiv:1506.02626", "section 5, figure 5")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Without retraining, dropping the smallest 10 % (20 %) of each row raises the perplexity by at most 1 % (5 %).",
        where=PAPER,
        scale="nano, all matrices of the blocks; no chance in it",
        check=partial(_on, "nano", "low", Magnitude()),
        broken=partial(_on, "nano", "low", Smallest()),
    ),
    Claim(
        says="At 50 % sparsity, dropping the smallest weights loses less KL and perplexity than dropping at random.",
        where=PAPER,
        scale="nano, all matrices of the blocks, half of each row, 3 random prunings",
        check=partial(_on, "nano", "half", Magnitude()),
        broken=partial(_on, "nano", "half", Smallest()),
    ),
)
