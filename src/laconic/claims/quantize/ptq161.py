"""Claims of PTQ1.61: which channels are kept finer, and the whole against one bit and against two. Every byte is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, held, measure, on, seen, spread, taught, tuned
from laconic.claims.quantize.flexround import small
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.packed import Packed
from laconic.core.site import Linear, Site
from laconic.core.statistic import Peaks
from laconic.core.transform import Change, Lesson, Objective, Stats, Transform
from laconic.kernels.angle import SquaredAndAngle
from laconic.kernels.grids import Grid
from laconic.methods.quantize.restore.restorative import Restorative
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.ptq161 import PTQ161, Salient
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.train.scales import Scales
from laconic.restoring import Restored, merged

LEVEL, OURS = Salient(), PTQ161()
# steps are few, and rates higher in proportion
LEARNED = Scales(rates=(("step", 1e-2),), decay="cosine", batch=4)
MOVED = Restorative(rates=(("a", 3e-3), ("b", 3e-3)), batch=4)


@dataclass(frozen=True)
class Elsewhere(Objective):
    """The stand-in: every channel must meet what the original gives for another. (To meet another sequence still lowers KL: a block in one
    bit is so far off that what all sequences have in common is a gain.)"""

    name = "squared error and angle to other channels"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return SquaredAndAngle()(output, target.roll(target.shape[-1] // 2, -1), mask)


@dataclass(frozen=True)
class Chosen(Transform):
    """PTQ1.61 whose salient channels are others: of the largest `weights`, drawn by `chance`, or the `quietest` (the stand-in)."""

    what: str

    acts_on = (Linear,)
    level = Salient
    wants = (Peaks(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Salient) -> Change:
        m = site.matrix[1]
        if self.what == "weights":
            peaks = weights["weight"].float().reshape(site.matrix).norm(dim=0)
        elif self.what == "chance":
            peaks = torch.rand(m, generator=torch.Generator().manual_seed(m))
        else:
            peaks = 1 / stats[Peaks()].clamp(min=1e-6)
        return OURS(site, weights, {Peaks(): peaks}, level)

    def stored(self, site: Site, level: Salient) -> int:
        return OURS.stored(site, level)


def sized(bench: Bench, lesson: Lesson, quick: bool) -> Lesson:
    """As many steps for all: 100 in a quick run (25 of nano), else 400."""
    return replace(lesson, steps=(100 if bench.name == "stories260k" else 25) if quick else 400)


def scaled(lesson: Lesson, bench: Bench, seed: int, quick: bool) -> Found:
    """Signs whose scales the lesson has learned, block by block, on rows of 128 tokens; made once."""

    def make() -> Found:
        return measure(bench, tuned(small(bench, quick), held(bench, OURS, LEVEL, seed), sized(bench, lesson, quick), seed))

    found: Found = bench.once(("scaled", lesson, seed, quick), make)
    return found


def whole(astray: bool, bench: Bench, seed: int, quick: bool) -> Found:
    """The weights moved before, then signs and learned scales of what they are now; measured against the original; made once."""

    def make() -> Found:
        own = small(bench, quick)
        forms = tuned(own, held(bench, OURS, LEVEL, seed), sized(bench, LEARNED, quick), seed)
        moved, _ = taught(own, forms, sized(bench, MOVED, quick), seed, astray=astray, end=merged)
        source = Restored(bench.source, {name: form.dense() for name, form in moved.items()})
        other = replace(bench, source=source, kept={})
        again: dict[str, Packed] = tuned(small(other, quick), held(other, OURS, LEVEL, seed), sized(bench, LEARNED, quick), seed)
        return measure(bench, again)

    found: Found = bench.once(("restored", seed, quick, astray), make)
    return found


Made = Callable[[Bench, int, bool], Found]


def plain(transform: Transform, level: Any, bench: Bench, seed: int, quick: bool) -> Found:
    """A method by itself."""
    return seen(bench, transform, level, seed)


@gathered
def _against(ours: Made, theirs: Made, names: tuple[str, str], seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    draws = seeds if bench.name == "stories260k" or not quick else seeds[:1]
    found = [[made(bench, seed, quick) for seed in draws] for made in (ours, theirs)]
    yield duel("a fifth in 4 bits", *found, names=names)
    weights = sum(site.matrix[0] * site.matrix[1] for site in bench.source.anatomy.sites() if bench.linears(OURS, LEVEL)(site))
    yield [], {"bits a weight, everything counted": spread([8 * one.bytes / weights for one in found[0]], "bits")}


def check(name: str, ours: Made, theirs: Made, names: tuple[str, str], seeds: Sequence[int], lab: Lab) -> Verdict:
    """One way to make a model of 1.6 bits against another."""
    return on(lab, name, partial(_against, ours, theirs, names, lab.draws(seeds), lab.quick))


def paper(where: str) -> Paper:
    return Paper("Zhao et al.", 2025, "arXiv:2502.13179", where)


SCALES = {
    "nano": "nano, all matrices of the blocks, a fifth of the columns in 4 bits; lessons of 400 steps of 4 rows of 128 tokens "
    "(quick: 25), 3 draws of the rows (quick: 1)",
    "stories260k": "stories260k on TinyStories, all matrices of the blocks, a fifth of the columns in 4 bits; lessons of 400 steps of "
    "4 rows of 128 tokens (quick: 100), 3 draws of the rows",
}
ANALYTIC = partial(plain, OURS, LEVEL)
WHOLE = partial(whole, False)
BY_WEIGHTS, BY_CHANCE, QUIETEST = (partial(plain, Chosen(what), LEVEL) for what in ("weights", "chance", "quietest"))
# of all that PTQ1.61 is, one bit alone: the rival of the first of these claims, and the stand-in of all
ONE_BIT = partial(plain, OURS, Salient(share=0.0))
ELSEWHERE = replace(LEARNED, objective=Elsewhere())
ASTRAY = partial(scaled, ELSEWHERE)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Scales being as they are, columns chosen by what they are multiplied with give a lower KL than those of the largest weights.",
        where=paper("section 3.2, table 5"),
        scale=SCALES["nano"],
        check=partial(check, "nano", ANALYTIC, BY_WEIGHTS, ("by inputs", "by weights"), SEEDS),
        broken=partial(check, "nano", QUIETEST, BY_WEIGHTS, ("by inputs", "by weights"), ONE),
    ),
    Claim(
        says="Scales being as they are, columns chosen by what they are multiplied with give a lower KL than columns by chance.",
        where=paper("section 3.2, table 5"),
        scale=SCALES["nano"],
        check=partial(check, "nano", ANALYTIC, BY_CHANCE, ("by inputs", "by chance"), SEEDS),
        broken=partial(check, "nano", QUIETEST, BY_CHANCE, ("by inputs", "by chance"), ONE),
    ),
    Claim(
        says="The whole has a lower KL than all columns in one bit, by formula.",
        where=paper("section 4, table 1"),
        scale=SCALES["nano"],
        check=partial(check, "nano", WHOLE, ONE_BIT, ("PTQ1.61", "one bit"), SEEDS),
        broken=partial(check, "nano", ONE_BIT, ONE_BIT, ("PTQ1.61", "one bit"), ONE),
    ),
    Claim(
        says="The whole has a lower KL than round to nearest in 2 bits and groups of 64, which takes more bytes.",
        where=paper("section 4, table 1"),
        scale=SCALES["nano"],
        check=partial(check, "nano", WHOLE, partial(plain, RTN(), Grid(2, 64)), ("PTQ1.61", "round to nearest in 2 bits"), SEEDS),
        broken=partial(check, "nano", ONE_BIT, partial(plain, RTN(), Grid(2, 64)), ("PTQ1.61", "round to nearest in 2 bits"), ONE),
    ),
    Claim(
        says="The whole has a lower KL than GPTQ in 2 bits and groups of 64, which takes more bytes.",
        where=paper("section 4, table 1"),
        scale=SCALES["nano"],
        check=partial(check, "nano", WHOLE, partial(plain, GPTQ(), Grid(2, 64)), ("PTQ1.61", "GPTQ in 2 bits"), SEEDS),
        broken=partial(check, "nano", ONE_BIT, partial(plain, GPTQ(), Grid(2, 64)), ("PTQ1.61", "GPTQ in 2 bits"), ONE),
    ),
    Claim(
        says="Scales being as they are, columns chosen by what they are multiplied with give a lower KL than those of the "
        "largest weights, on a model trained by others.",
        where=paper("section 3.2, table 5"),
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", ANALYTIC, BY_WEIGHTS, ("by inputs", "by weights"), SEEDS),
        broken=partial(check, "stories260k", QUIETEST, BY_WEIGHTS, ("by inputs", "by weights"), ONE),
    ),
    Claim(
        says="Scales being as they are, columns chosen by what they are multiplied with give a lower KL than columns by "
        "chance, on a model trained by others.",
        where=paper("section 3.2, table 5"),
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", ANALYTIC, BY_CHANCE, ("by inputs", "by chance"), SEEDS),
        broken=partial(check, "stories260k", QUIETEST, BY_CHANCE, ("by inputs", "by chance"), ONE),
    ),
    Claim(
        says="The whole has a lower KL than all columns in one bit, by formula, on a model trained by others.",
        where=paper("section 4, table 1"),
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", WHOLE, ONE_BIT, ("PTQ1.61", "one bit"), SEEDS),
        broken=partial(check, "stories260k", ONE_BIT, ONE_BIT, ("PTQ1.61", "one bit"), ONE),
    ),
    Claim(
        says="The whole has a lower KL than round to nearest in 2 bits and groups of 32, which takes more bytes, on a model "
        "trained by others.",
        where=paper("section 4, table 1"),
        scale=SCALES["stories260k"],
        check=partial(
            check,
            "stories260k",
            WHOLE,
            partial(plain, RTN(), Grid(2, 32)),
            ("PTQ1.61", "round to nearest in 2 bits"),
            SEEDS,
        ),
        broken=partial(check, "stories260k", ONE_BIT, partial(plain, RTN(), Grid(2, 32)), ("PTQ1.61", "round to nearest in 2 bits"), ONE),
    ),
    Claim(
        says="The whole has a lower KL than GPTQ in 2 bits and groups of 32, which takes more bytes, on a model trained by others.",
        where=paper("section 4, table 1"),
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", WHOLE, partial(plain, GPTQ(), Grid(2, 32)), ("PTQ1.61", "GPTQ in 2 bits"), SEEDS),
        broken=partial(check, "stories260k", ONE_BIT, partial(plain, GPTQ(), Grid(2, 32)), ("PTQ1.61", "GPTQ in 2 bits"), ONE),
    ),
)
