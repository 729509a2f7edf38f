"""Claims of learned clipping: against whole ranges, which it begins with, and ranges that are searched, on one grid in the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from laconic.claims.lab import ONE, SEEDS, Bench, judged, on
from laconic.claims.quantize.flexround import Swapped, after, beaten, nearest, numbers_of
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.transform import Lesson, Transform
from laconic.kernels.grids import Grid
from laconic.methods.quantize.round.clipped import Clipped
from laconic.methods.quantize.round.lwc import LWC
from laconic.methods.quantize.round.rtn import RTN

# the best of 0.03, 0.1 and 0.3, falling, on the search part of stories260k at 3 and 2 bits in 100 steps
OURS = LWC(rates=(("c", 3e-1), ("d", 3e-1)), decay="cosine")
ASTRAY = replace(OURS, objective=Swapped())
LEVELS = (Grid(3, 64), Grid(2, 64))


def _against(ours: Lesson, rival: Transform, name: str, factor: float, seeds: Sequence[int], quick: bool, bench: Bench) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    names = ("learned ranges", name)
    for level in LEVELS:
        label = f"{level.bits} bits in groups of {level.group}"
        mine = [after(bench, ours, level, seed, quick, RTN()) for seed in seeds]
        theirs = [nearest(bench, level, rival, seed) for seed in (seeds if rival.wants else ONE)]
        wrong += beaten(label, mine, theirs, names, factor)
        numbers |= numbers_of(label, names[0], mine) | numbers_of(label, names[1], theirs)
    return judged(wrong, numbers)


def against(ours: Lesson, rival: Transform, name: str, factor: float, seeds: Sequence[int], lab: Lab) -> Verdict:
    """Learned ranges against others."""
    return on(lab, "stories260k", partial(_against, ours, rival, name, factor, lab.draws(seeds), lab.quick))


PAPER = Paper("Shao et al.", 2023, "arXiv:2308.13137", "section 4.2, tables 1 and 2")
SCALE = (
    "stories260k on TinyStories, all matrices of the blocks, 3 and 2 bits in groups of 64, block by block, 400 steps of 4 rows of 128 "
    "tokens (quick: 100), 3 draws of the calibration rows"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 3 and 2 bits, the KL and block output error of learned ranges are at most 1 / 1.3 of those of whole ones.",
        where=PAPER,
        scale=SCALE,
        check=partial(against, OURS, RTN(), "whole ranges", 1.3, SEEDS),
        broken=partial(against, ASTRAY, RTN(), "whole ranges", 1.3, ONE),
    ),
    Claim(
        says="At 3 and 2 bits, KL and block output error of learned ranges are at most those of ranges searched by the weights' error.",
        where=PAPER,
        scale=SCALE,
        check=partial(against, OURS, RTN(clip=True), "searched by the weights' error", 1.0, SEEDS),
        broken=partial(against, ASTRAY, RTN(clip=True), "searched by the weights' error", 1.0, ONE),
    ),
    Claim(
        says="At 3 and 2 bits, KL and block output error of learned ranges are at most those of ranges searched by each group's output.",
        where=PAPER,
        scale=SCALE,
        check=partial(against, OURS, Clipped(), "searched by the output", 1.0, SEEDS),
        broken=partial(against, ASTRAY, Clipped(), "searched by the output", 1.0, ONE),
    ),
)
