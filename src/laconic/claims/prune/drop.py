"""Claims of dropping weights: the freer the pattern the better, and zeros with bits against fewer bits at equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Found, duel, judged, on, run, seen, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.score import Score, Unit
from laconic.core.site import Site
from laconic.core.statistic import Statistic
from laconic.core.transform import Transform
from laconic.kernels.grids import Grid
from laconic.methods.prune.cut.drop import Drop, Sparsity
from laconic.methods.prune.score.magnitude import Magnitude
from laconic.methods.prune.score.wanda import Wanda
from laconic.methods.quantize.round.rtn import RTN


@dataclass(frozen=True)
class Shuffled(Score):
    """The stand-in: a score whose columns are in another order than the weights'."""

    score: Score

    @property
    def wants(self) -> tuple[Statistic, ...]:  # type: ignore[override]
        return self.score.wants

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        found = self.score(unit, stats)
        return found[:, torch.randperm(found.shape[1], generator=torch.Generator().manual_seed(0))]


def _order(bench: Bench, score: Score, free: Score, draws: Sequence[int]) -> Verdict:
    """KL of 50 % of each row <= 4:8 <= 2:4, in every seed; `free` scores the first."""
    seeds = draws if score.wants else draws[:1]
    levels = (("50 % of each row", free, Sparsity(0.5)), ("4 of each 8", score, Sparsity(0.5, 8)), ("2 of each 4", score, Sparsity(0.5, 4)))
    rows: list[list[Found]] = []
    numbers: dict[str, Measurement] = {}
    for label, used, level in levels:
        rows.append([seen(bench, Drop(used), level, seed) for seed in seeds])
        numbers[f"{label}: KL"] = spread([one.kl for one in rows[-1]], "nats/token")
        numbers[f"{label}: perplexity"] = spread([one.perplexity for one in rows[-1]], "")
        numbers[f"{label}: bytes"] = spread([float(one.bytes) for one in rows[-1]], "bytes")
    wrong = [
        f"KL of {levels[i][0]} is above that of {levels[i + 1][0]}"
        for i in range(2)
        if any(a.kl > b.kl for a, b in zip(rows[i], rows[i + 1], strict=True))
    ]
    return judged(wrong, numbers)


def _bits(bench: Bench, score: Score, seeds: Sequence[int]) -> Verdict:
    """Half of the weights in 4 bits against all of them in 3, whose groups are made as fine as the same bytes allow."""
    level = Sparsity(0.5, None, Grid(4, 64))
    drop = Drop(score, RTN())

    def dense(site: Site) -> tuple[Transform, Grid] | None:
        if bench.linears(drop, level)(site) is None:
            return None
        limit = drop.stored(site, level)
        group = next((g for g in range(8, site.matrix[1] + 1) if RTN().stored(site, Grid(3, g)) <= limit), None)
        return RTN(), Grid(3, group)

    theirs = bench.once("3 bits", lambda: run(bench, dense))
    ours = [seen(bench, drop, level, seed) for seed in seeds]
    return judged(*duel("at equal bytes", ours, [theirs], names=("half in 4 bits", "all in 3 bits")))


def _on_nano(check: str, score: Score, free: Score, seeds: Sequence[int], lab: Lab) -> Verdict:
    seeds = lab.draws(seeds)
    return on(lab, "nano", lambda bench: _order(bench, score, free, seeds) if check == "order" else _bits(bench, score, seeds))


WANDA = Paper("Sun et al.", 2023, "arXiv:2306.11695", "section 4.2, table 3")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 50 % sparsity by Wanda, the KL of free choice in a row is at most that of 4:8, and that at most that of 2:4.",
        where=WANDA,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on_nano, "order", Wanda(), Wanda(), SEEDS),
        broken=partial(_on_nano, "order", Wanda(), Shuffled(Wanda()), ONE),
    ),
    Claim(
        says="At 50 % sparsity by magnitude, the KL of free choice in a row is at most that of 4:8, and that at most that of 2:4.",
        where=WANDA,
        scale="nano, all matrices of the blocks; no chance in it",
        check=partial(_on_nano, "order", Magnitude(), Magnitude(), SEEDS),
        broken=partial(_on_nano, "order", Magnitude(), Shuffled(Magnitude()), ONE),
    ),
    Claim(
        says="At equal bytes, half of the weights in 4 bits lose less KL and perplexity than all of them in 3 bits.",
        where=Paper("Frantar and Alistarh", 2023, "arXiv:2301.00774", "joint sparsification and quantization"),
        scale="nano, all matrices of the blocks, Wanda and round to nearest, masks counted as bytes, 3 draws of the calibration rows",
        check=partial(_on_nano, "bits", Wanda(), Wanda(), SEEDS),
        broken=partial(_on_nano, "bits", Shuffled(Wanda()), Wanda(), ONE),
    ),
)
