"""Claims of PTQ1.61's learned scales: against scales by formula, and what the angle in their objective costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, duel, gathered, on
from laconic.claims.quantize.ptq161 import ANALYTIC, ASTRAY, ELSEWHERE, LEARNED, SCALES, check, paper, scaled
from laconic.core.claim import Claim, Lab, Verdict
from laconic.core.transform import Lesson
from laconic.kernels.angle import SquaredAndAngle


@gathered
def _harmless(ours: Lesson, seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    draws = seeds if bench.name == "stories260k" or not quick else seeds[:1]
    with_angle = [scaled(ours, bench, seed, quick) for seed in draws]
    without = [scaled(replace(LEARNED, objective=SquaredAndAngle(angle=0.0)), bench, seed, quick) for seed in draws]
    _, numbers = duel("a fifth in 4 bits", with_angle, without, names=("with the angle", "squared error alone"))
    dear = any(a.kl > 1.02 * b.kl for a, b in zip(with_angle, without, strict=True))
    yield ["the angle costs more than 2 % of KL in a draw"] if dear else [], numbers


def harmless(name: str, ours: Lesson, seeds: Sequence[int], lab: Lab) -> Verdict:
    """What the angle costs."""
    return on(lab, name, partial(_harmless, ours, lab.draws(seeds), lab.quick))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="In the same bytes, learned scales give a lower KL than scales by formula.",
        where=paper("section 3.3, table 6"),
        scale=SCALES["nano"],
        check=partial(check, "nano", partial(scaled, LEARNED), ANALYTIC, ("learned", "by formula"), SEEDS),
        broken=partial(check, "nano", ASTRAY, ANALYTIC, ("learned", "by formula"), ONE),
    ),
    Claim(
        says="The angle in what the scales learn costs at most 2 % of KL in any draw.",
        where=paper("section 3.3, table 6"),
        scale=SCALES["nano"],
        check=partial(harmless, "nano", LEARNED, SEEDS),
        broken=partial(harmless, "nano", ELSEWHERE, ONE),
    ),
    Claim(
        says="In the same bytes, learned scales give a lower KL than scales by formula, on a model trained by others.",
        where=paper("section 3.3, table 6"),
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", partial(scaled, LEARNED), ANALYTIC, ("learned", "by formula"), SEEDS),
        broken=partial(check, "stories260k", ASTRAY, ANALYTIC, ("learned", "by formula"), ONE),
    ),
    Claim(
        says="The angle in what the scales learn costs at most 2 % of KL in any draw, on a model trained by others.",
        where=paper("section 3.3, table 6"),
        scale=SCALES["stories260k"],
        check=partial(harmless, "stories260k", LEARNED, SEEDS),
        broken=partial(harmless, "stories260k", ELSEWHERE, ONE),
    ),
)
