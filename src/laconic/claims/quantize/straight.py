"""Claims of tuning codes and step sizes of the whole model together: the same forms, so the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, held, measure, on, seen, tuned
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.transform import Lesson
from laconic.kernels.grids import Grid
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.train.straight import Straight

FIRST = GPTQ(clip=True)
STEPS = f"{Straight().steps} steps of {Straight().batch} rows"
STEPS_ALONE = replace(Straight(), rates=(("step", dict(Straight().rates)["step"]),))
RIVALS = {"step sizes alone": STEPS_ALONE, "the text alone": Straight(copies=0)}


def _after(bench: Bench, level: Grid, lesson: Lesson, seed: int, astray: bool) -> Found:
    """GPTQ, then the lesson, measured; made once."""

    def make() -> Found:
        return measure(bench, tuned(bench, held(bench, FIRST, level, seed), lesson, seed, astray=astray))

    found: Found = bench.once(("tuned", level, lesson, seed, astray), make)
    return found


@dataclass(frozen=True)
class Noise(Straight):
    """The stand-in: tokens of the copies are drawn from anything."""

    def varied(self, inputs: Tensor, predictions: Callable[[], Iterator[Tensor]], room: int, generator: torch.Generator) -> Tensor:
        return super().varied(inputs, lambda: (torch.zeros_like(logits) for logits in predictions()), room, generator)


@gathered
def _against(bench: Bench, lesson: Lesson, rival: str, levels: Sequence[Grid], seeds: Sequence[int], astray: bool) -> Iterator[Duel]:
    for level in levels:
        ours = [_after(bench, level, lesson, seed, astray) for seed in seeds]
        if rival == "GPTQ":
            theirs = [seen(bench, FIRST, level, seed) for seed in seeds]
        else:
            theirs = [_after(bench, level, RIVALS[rival], seed, False) for seed in seeds]
        yield duel(f"{level.bits} bits, groups of {level.group}", ours, theirs, names=("tuned", rival))


def _on(name: str, lesson: Lesson, rival: str, seeds: Sequence[int], astray: bool, lab: Lab) -> Verdict:
    levels = [Grid(3, 64)] if lab.quick else [Grid(4, 64), Grid(3, 64), Grid(2, 64)]
    # one draw is what a quick check of minutes has room for
    return on(lab, name, lambda bench: _against(bench, lesson, rival, levels, seeds[:1] if lab.quick else seeds, astray))


OURS, NOISE = Straight(), Noise(replaced=1.0)
HOW = f"all matrices of the blocks, 4, 3 and 2 bits (quick: 3), {STEPS}, 3 draws of the calibration rows (quick: 1)"
SCALES = {"nano": f"nano, {HOW}", "stories260k": f"stories260k on TinyStories, {HOW}"}
LSQ = Paper("Esser et al.", 2020, "arXiv:1902.08153", "section 3.4, table 1")
SAMPLED = Paper("Bengio et al.", 2015, "arXiv:1506.03099", "section 2.4")
QAT = Paper("Liu et al.", 2023, "arXiv:2305.17888", "section 3.2, table 1")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Tuning a GPTQ model whole lowers its KL and its perplexity in the same bytes.",
        where=QAT,
        scale=SCALES["nano"],
        check=partial(_on, "nano", OURS, "GPTQ", SEEDS, False),
        broken=partial(_on, "nano", OURS, "GPTQ", ONE, True),
    ),
    Claim(
        says="Tuning a GPTQ model whole lowers its KL and its perplexity in the same bytes, on a model trained by others.",
        where=QAT,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", OURS, "GPTQ", SEEDS, False),
        broken=partial(_on, "stories260k", OURS, "GPTQ", ONE, True),
    ),
    Claim(
        says="In equal steps and bytes, learning codes and step sizes has the lower KL and perplexity than learning step sizes alone.",
        where=LSQ,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", OURS, "step sizes alone", SEEDS, False),
        broken=partial(_on, "stories260k", OURS, "step sizes alone", ONE, True),
    ),
    Claim(
        says="In equal steps and bytes, copies of the text in the original's own words give a lower KL and perplexity than the text alone.",
        where=SAMPLED,
        scale=SCALES["nano"],
        check=partial(_on, "nano", OURS, "the text alone", SEEDS, False),
        broken=partial(_on, "nano", NOISE, "the text alone", ONE, False),
    ),
    Claim(
        says="In equal steps and bytes, copies of the text in the original's own words give a lower KL and perplexity than the text "
        "alone, on a model trained by others.",
        where=SAMPLED,
        scale=SCALES["stories260k"],
        check=partial(_on, "stories260k", OURS, "the text alone", SEEDS, False),
        broken=partial(_on, "stories260k", NOISE, "the text alone", ONE, False),
    ),
)
