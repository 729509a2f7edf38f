"""Claims of PV-Tuning: the same first codes, rows, steps and bytes as for straight-through tuning and for learning codebooks alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, held, judged, measure, on, seen, spread, taught, tuned
from laconic.claims.quantize.flexround import small
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.packed import Packed, Soft
from laconic.core.transform import Lesson
from laconic.methods.quantize.round.vptq import VPTQ, Codebooks
from laconic.methods.quantize.train.pv import PV, Revised
from laconic.methods.quantize.train.straight import Straight

FIRST = VPTQ()
# about 2 bits and 1 bit with tables that matrices of that size can pay for
LEVELS = {"nano": (Codebooks(4, 2), Codebooks(8, 1)), "stories260k": (Codebooks(2, 2), Codebooks(4, 1))}
# so few steps must be longer than the paper's: trust, the nudge's rate and its decay are at the best of some twenty settings on calibration
# rows of stories260k that no lesson saw; one vector of its smallest matrices is 0.016 of their norm
OURS = PV(trust=0.03)
ALONE = replace(PV(), rates=tuple(rate for rate in PV().rates if rate[0] != "nudge"))


def sized(lesson: Lesson, quick: bool) -> Lesson:
    """As many steps for all: 60 in a quick run, else 400."""
    return replace(lesson, steps=60 if quick else 400)


def _after(bench: Bench, level: Codebooks, lesson: Lesson, seed: int, quick: bool, astray: bool = False) -> Found:
    """VPTQ, then the lesson on rows of 128 tokens, measured; made once."""

    def make() -> Found:
        forms = tuned(small(bench, quick), held(bench, FIRST, level, seed), sized(lesson, quick), seed, astray=astray)
        return measure(bench, forms)

    found: Found = bench.once(("revised", level, lesson, seed, quick, astray), make)
    return found


@gathered
def _against(rival: Lesson, name: str, astray: bool, seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    levels = LEVELS[bench.name]
    for level in levels[:1] if quick else levels:
        label = f"{level.bits:g} bits, vectors of {level.width}"
        draws = seeds if bench.name == "stories260k" or not quick else seeds[:1]
        ours = [_after(bench, level, OURS, seed, quick, astray) for seed in draws]
        theirs = [_after(bench, level, rival, seed, quick) for seed in draws]
        yield duel(label, ours, theirs, names=("PV", name))
        yield [], {f"{label}: KL before learning": spread([seen(bench, FIRST, level, seed).kl for seed in draws], "nats/token")}


def _on(name: str, rival: Lesson, other: str, astray: bool, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, partial(_against, rival, other, astray, lab.draws(seeds), lab.quick))


@dataclass(frozen=True)
class Watched(Lesson):
    """V steps alone, of a lesson whose forms stay in sight."""

    inner: PV = field(default_factory=PV)
    forms: list[Soft] = field(default_factory=list, compare=False)

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        soft = self.inner.soften(held, target)
        if soft is not None:
            self.forms.append(soft)
        return soft


def _alone(inner: PV, rate: float, seeds: Sequence[int], quick: bool, bench: Bench) -> Verdict:
    """The objective on one and the same batch, step after step, and the codes that each step exchanges."""
    own, level = small(bench, quick), LEVELS[bench.name][0]
    rises, flips, falls = [], [], []
    for seed in seeds:
        lesson = Watched(inner.objective, (("nudge", rate),), 12 if quick else 40, own.rows, decay="constant", inner=inner)
        steps: list[int] = []

        def count(stage: str, done: int, total: int, note: str, lesson: Watched = lesson, steps: list[int] = steps) -> None:
            revised = [part for form in lesson.forms for part in form.modules() if isinstance(part, Revised)]
            if done:
                steps.append(sum(part.flips for part in revised))

        losses = taught(own, held(bench, FIRST, level, seed), lesson, seed, progress=count)[1]
        rises.append(float(sum(after > before for before, after in pairwise(losses))))
        flips.append(float(min(steps)))
        falls.append(losses[-1] / losses[0])
    numbers = {
        "steps after which the loss is higher": spread(rises, ""),
        "codes exchanged, least of all steps": spread(flips, ""),
        "loss on the calibration rows before the last step over that before the first": spread(falls, ""),
    }
    wrong = ["a step raises the loss"] if max(rises) else []
    return judged(wrong + (["a step exchanges no code"] if min(flips) == 0 else []), numbers)


def _steps(name: str, inner: PV, rate: float, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, partial(_alone, inner, rate, lab.draws(seeds), lab.quick))


PAPER = Paper("Malinovskii et al.", 2024, "arXiv:2405.14852", "section 4.3, table 2")
LINEAR = Paper("Malinovskii et al.", 2024, "arXiv:2405.14852", "section 3.2, algorithm 3")
ROWS = "rows of 128 tokens, 3 draws of the calibration rows"
SCALES = {
    "nano": f"nano, all matrices of the blocks, vectors of 4 and 8 with 8 bits, 400 steps of 4 {ROWS} (quick: of 4, 60 steps, 1 draw)",
    "stories260k": f"stories260k on TinyStories, all matrices of the blocks, vectors of 2 and 4 with 4 bits, 400 steps of 4 {ROWS} "
    "(quick: of 2, 60 steps)",
}

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="From the same codes, in equal steps and bytes, PV-Tuning has a lower KL and perplexity than straight-through tuning.",
        where=PAPER,
        scale=SCALES["nano"],
        check=partial(_on, "nano", Straight(), "straight-through tuning", False, SEEDS),
        broken=partial(_on, "nano", Straight(), "straight-through tuning", True, ONE),
    ),
    Claim(
        says="From the same codes, in equal steps and bytes, PV-Tuning has a lower KL and perplexity than tuning codebooks alone.",
        where=PAPER,
        scale=SCALES["nano"],
        check=partial(_on, "nano", ALONE, "tuning codebooks alone", False, SEEDS),
        broken=partial(_on, "nano", ALONE, "tuning codebooks alone", True, ONE),
    ),
    Claim(
        says="From the same codes, in equal steps and bytes, PV-Tuning has a lower KL and perplexity than straight-through "
        "tuning, on a model trained by others.",
        where=PAPER,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", Straight(), "straight-through tuning", False, SEEDS),
        broken=partial(_on, "stories260k", Straight(), "straight-through tuning", True, ONE),
    ),
    Claim(
        says="From the same codes, in equal steps and bytes, PV-Tuning has a lower KL and perplexity than tuning codebooks "
        "alone, on a model trained by others.",
        where=PAPER,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", ALONE, "tuning codebooks alone", False, SEEDS),
        broken=partial(_on, "stories260k", ALONE, "tuning codebooks alone", True, ONE),
    ),
    Claim(
        says="V steps alone, of few codes each, never raise the loss on the batch that they look at, and each exchanges some codes.",
        where=LINEAR,
        scale="stories260k on TinyStories, all matrices of the blocks, vectors of 2 with 4 bits, 16 rows of 128 tokens, 12 steps (in full "
        "64 rows, 40 steps), 3 draws of the rows",
        check=partial(_steps, "stories260k", PV(trust=0.02), 1.0, SEEDS),
        # all at once
        broken=partial(_steps, "stories260k", PV(share=1.0, trust=1.0), 1.0, ONE),
    ),
)
