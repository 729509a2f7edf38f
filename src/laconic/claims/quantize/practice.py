"""Claims of the practices of learned rounding: all of them against AdaRound and rounding to nearest, and each switch against the default,
on one held grid, so in equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Found, bench_of, held, judged, measure, on, seen, spread, tuned
from laconic.claims.quantize.flexround import ADA, DRAWS, NEAREST, ROWS, Swapped, against, small
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.transform import Lesson
from laconic.kernels.grids import Grid
from laconic.kernels.losses import Euclidean
from laconic.methods.quantize.round.practice import Practice

# for steps so few; of six settings of soft choice, reach, rates and weigh the least error of one block of stories260k after 200 steps
OURS = Practice(rates=(("v", 7e-2), ("step", 3e-3)), weigh=0.1)
ASTRAY = replace(OURS, objective=Swapped())
LEVEL = Grid(3, None)


@dataclass(frozen=True)
class Way:
    """A lesson, and whether its calibration text is Python's own modules in place of stories."""

    lesson: Lesson
    code: bool = False


def learned(bench: Bench, way: Way, seed: int, quick: bool) -> Found:
    """What a lesson makes of the grid in few steps, measured; made once."""

    def make() -> Found:
        own = small(bench, quick)
        if way.code:
            own = replace(own, pool=bench.once("code", partial(code, bench))[:, : own.pool.shape[1]])
        lesson = replace(way.lesson, steps=30 if quick else 200, batch=4)
        return measure(bench, tuned(own, held(bench, NEAREST, LEVEL), lesson, seed))

    found: Found = bench.once(("practice", way, seed, quick), make)
    return found


def code(bench: Bench) -> Tensor:
    """Rows of Python's own modules in the model's tokens."""
    return bench_of("code", bench.source, None, True).pool


def _gains(bench: Bench, way: Way, seeds: Sequence[int], quick: bool) -> list[float]:
    """By how much KL falls from that of rounding to nearest, as a share of it."""
    plain = seen(bench, NEAREST, LEVEL).kl
    return [1 - learned(bench, way, seed, quick).kl / plain for seed in seeds]


def _robust(ours: Way, others: dict[str, Way], share: float, seeds: Sequence[int], quick: bool, bench: Bench) -> Verdict:
    numbers: dict[str, Measurement] = {"KL falls by, default": spread(_gains(bench, ours, seeds, quick), "share")}
    wrong = []
    for name, way in others.items():
        numbers[f"KL falls by, {name}"] = found = spread(_gains(bench, way, seeds, quick), "share")
        if found.value < share * numbers["KL falls by, default"].value:
            wrong.append(f"with {name} KL falls by less than {share:g} of what it falls by")
    return judged(wrong, numbers)


def robust(ours: Way, others: dict[str, Way], share: float, seeds: Sequence[int], lab: Lab) -> Verdict:
    """With each of the others, KL falls by at least this share of what it falls by, in the mean over draws."""
    return on(lab, "stories260k", partial(_robust, ours, others, share, lab.draws(seeds), lab.quick))


def _matters(ours: Way, others: dict[str, Way], factor: float, seeds: Sequence[int], quick: bool, bench: Bench) -> Verdict:
    numbers = {"KL, default": spread([learned(bench, ours, seed, quick).kl for seed in seeds], "nats/token")}
    wrong = []
    for name, way in others.items():
        numbers[f"KL, {name}"] = found = spread([learned(bench, way, seed, quick).kl for seed in seeds], "nats/token")
        if found.value < factor * numbers["KL, default"].value:
            wrong.append(f"with {name} KL is not {factor:g} times that of the default")
    return judged(wrong, numbers)


def matters(ours: Way, others: dict[str, Way], factor: float, seeds: Sequence[int], lab: Lab) -> Verdict:
    """With each of the others, KL is at least so many times as high, in the mean over draws."""
    return on(lab, "stories260k", partial(_matters, ours, others, factor, lab.draws(seeds), lab.quick))


STRAYED = {"another sample's output to meet": Way(ASTRAY)}
DATA = {"Python code as calibration text": Way(OURS, code=True)}
FEATURES = {
    "noise of a tenth on every layer's inputs": Way(replace(OURS, noise=0.1)),
    "the half of the weights that is nearest to another code": Way(replace(OURS, share=0.5)),
}
PROBLEM = {
    "the distance as loss": Way(replace(OURS, objective=Euclidean())),
    "one step up or down and scales as they are": Way(replace(OURS, reach=1, rates=ADA.rates, weigh=ADA.weigh)),
}
# steps of one size have rates as Adam's are; without a soft choice, at the better of two rates
PROCESS = {
    "steps of one size along the gradient's sign": Way(replace(OURS, optimiser="signed")),
    "rates that fall along a cosine": Way(replace(OURS, decay="cosine")),
    "no soft choice": Way(replace(OURS, soft="straight", decay="cosine", rates=(("v", 5e-3), ("step", 1e-2)))),
}
PAPER = Paper("Yvinec et al.", 2023, "arXiv:2308.07662", "abstract")
BLOCKS = f"stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits, one scale a row, block by block, {DRAWS}"
SWITCHES = (
    "stories260k on TinyStories, all matrices of the blocks, 3 bits, one scale a row, block by block, 200 steps of 4 rows of 128 tokens, "
    "3 draws of 64 calibration rows (quick: 30 steps, 1 draw of 16)"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="On the same grid, rows and steps, KL and block output error are at most those of AdaRound.",
        where=PAPER,
        scale=BLOCKS,
        check=partial(against, "stories260k", OURS, ADA, 1.0, ROWS, SEEDS),
        broken=partial(against, "stories260k", ASTRAY, ADA, 1.0, ROWS, ONE),
    ),
    Claim(
        says="KL and block output error are at most 1 / 1.3 of those of rounding to nearest on the same grid.",
        where=PAPER,
        scale=BLOCKS,
        check=partial(against, "stories260k", OURS, None, 1.3, ROWS, SEEDS),
        broken=partial(against, "stories260k", ASTRAY, None, 1.3, ROWS, ONE),
    ),
    Claim(
        says="The calibration set matters little: with another kind of text KL falls by at least nine tenths of what it falls by.",
        where=PAPER,
        scale=SWITCHES,
        check=partial(robust, Way(OURS), DATA, 0.9, SEEDS),
        broken=partial(robust, Way(OURS), STRAYED, 0.9, ONE),
    ),
    Claim(
        says="Noise on features and the choice of weights matter little: KL falls by at least nine tenths of what it falls by.",
        where=PAPER,
        scale=SWITCHES,
        check=partial(robust, Way(OURS), FEATURES, 0.9, SEEDS),
        broken=partial(robust, Way(OURS), STRAYED, 0.9, ONE),
    ),
    Claim(
        says="Loss and degrees of freedom matter: with another loss, or with less freedom, KL is at least 1.05 times as high.",
        where=PAPER,
        scale=SWITCHES,
        check=partial(matters, Way(OURS), PROBLEM, 1.05, SEEDS),
        broken=partial(matters, Way(ASTRAY), PROBLEM, 1.05, ONE),
    ),
    Claim(
        says="Variable, optimiser and schedule matter: without a soft choice, with steps of one size, or with rates that fall at once, KL "
        "is at least 1.05 times as high.",
        where=PAPER,
        scale=SWITCHES,
        check=partial(matters, Way(OURS), PROCESS, 1.05, SEEDS),
        broken=partial(matters, Way(ASTRAY), PROCESS, 1.05, ONE),
    ),
)
