"""Claims of Wanda: the same masks' size as magnitude pruning, so the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, duel, gathered, on, seen
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.score import Score, Unit
from laconic.core.statistic import Gram, Statistic
from laconic.methods.prune.cut.drop import Drop, Sparsity
from laconic.methods.prune.score.magnitude import Magnitude
from laconic.methods.prune.score.wanda import Wanda


@dataclass(frozen=True)
class Inverse(Score):
    """The stand-in: magnitude over the norm of the input."""

    wants = (Gram(),)

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        return unit.weight.abs() / stats[Gram()].diagonal().clamp(min=1e-12).sqrt()


@gathered
def _below(bench: Bench, score: Score, seeds: Sequence[int], levels: Mapping[str, Sparsity]) -> Iterator[Duel]:
    for label, level in levels.items():
        theirs = seen(bench, Drop(Magnitude()), level)
        ours = [seen(bench, Drop(score), level, seed) for seed in seeds]
        yield duel(label, ours, [theirs], names=("Wanda", "magnitude"))


def _on(name: str, levels: Mapping[str, Sparsity], score: Score, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _below(bench, score, lab.draws(seeds), levels))


PAPER = Paper("Sun et al.", 2023, "arXiv:2306.11695", "section 4.2, table 3")
FREE = {"50 % of each row": Sparsity(0.5)}
RUNS = {"4 of each 8": Sparsity(0.5, 8), "2 of each 4": Sparsity(0.5, 4)}

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 50 % of each row, Wanda's KL and perplexity are below those of magnitude pruning.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "nano", FREE, Wanda(), SEEDS),
        broken=partial(_on, "nano", FREE, Inverse(), ONE),
    ),
    Claim(
        says="At 4:8 and 2:4, Wanda's KL and perplexity are below those of magnitude pruning.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "nano", RUNS, Wanda(), SEEDS),
        broken=partial(_on, "nano", RUNS, Inverse(), ONE),
    ),
    Claim(
        says="On a model trained by others, Wanda's KL and perplexity are below magnitude pruning's at 50 % of each row, 4:8 and 2:4.",
        where=PAPER,
        scale="stories260k on TinyStories, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "stories260k", FREE | RUNS, Wanda(), SEEDS),
        broken=partial(_on, "stories260k", FREE | RUNS, Inverse(), ONE),
    ),
)
