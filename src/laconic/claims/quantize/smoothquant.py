"""Claims of SmoothQuant: against the same grids without it, so at equal bytes, and against other migration strengths.

Channels that are made loud and made up for in the weights are undone whole by any strength, since s takes the factor in, so strengths are
compared on the model as it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, duel, gathered, on, spread
from laconic.claims.quantize.awq import CHANNELS, LOUDER, Inverted, Where, compressed, loud, trained
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.transform import Align
from laconic.kernels.grids import Grid
from laconic.methods.quantize.round.inputs import Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.smooth.smoothquant import SmoothQuant

METHOD, W8A8 = Inputs(RTN()), WeightAndInputs(Grid(8, None, symmetric=True), 8)
OURS = SmoothQuant()


@gathered
def _below(
    bench: Bench, lab: Lab, where: Where, how: Align, others: Mapping[str, Align | None], factor: float, seeds: Sequence[int]
) -> Iterator[Duel]:
    ours, *rest = ([compressed(where(bench, lab, seed), one, METHOD, W8A8, seed) for seed in seeds] for one in (how, *others.values()))
    for name, theirs in zip(others, rest, strict=True):
        yield duel("W8A8", ours, theirs, names=("SmoothQuant", name), factor=factor)


def below(where: Where, how: Align, others: Mapping[str, Align | None], factor: float, seeds: Sequence[int], lab: Lab) -> Verdict:
    """A lower KL and perplexity than each of some others."""
    return on(lab, "stories260k", lambda bench: _below(bench, lab, where, how, others, factor, lab.draws(seeds)))


@gathered
def _percent(bench: Bench, lab: Lab, how: Align, seeds: Sequence[int]) -> Iterator[Duel]:
    for name, where in (("as trained", trained), ("with loud channels", loud)):
        found = [compressed(where(bench, lab, seed), how, METHOD, W8A8, seed) for seed in seeds]
        numbers = {f"{name}: KL": spread([one.kl for one in found], "nats/token")}
        numbers |= {f"{name}: rise of perplexity": spread([one.gap for one in found], "share")}
        worst = max(one.gap for one in found)
        yield ([f"{name}: perplexity rises by {worst:.1%}"] if worst >= 0.01 else []), numbers


def percent(how: Align, seeds: Sequence[int], lab: Lab) -> Verdict:
    """Next to nothing is lost."""
    return on(lab, "stories260k", lambda bench: _percent(bench, lab, how, lab.draws(seeds)))


PAPER = Paper("Xiao et al.", 2022, "arXiv:2211.10438", "section 5, tables 3 to 5")
STRENGTH = replace(PAPER, section="section 5.5, figure 10")
SCALE = (
    "stories260k on TinyStories, all matrices of the blocks, one scale a row, inputs by one scale a token, 3 draws of the calibration rows"
)
LOUD = f"{SCALE}; {CHANNELS} channels behind each norm {LOUDER:g} times as loud, drawn by the seed"
ENDS: Mapping[str, Align | None] = {"alpha 0": SmoothQuant(alpha=0.0), "alpha 1": SmoothQuant(alpha=1.0)}

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With loud channels, the KL of W8A8 is at most half of that without smoothing.",
        where=PAPER,
        scale=LOUD,
        check=partial(below, loud, OURS, {"no smoothing": None}, 2.0, SEEDS),
        broken=partial(below, loud, Inverted(OURS), {"no smoothing": None}, 2.0, ONE),
    ),
    Claim(
        says="On the model as it was trained, the KL and perplexity of W8A8 are below those without smoothing.",
        where=PAPER,
        scale=SCALE,
        check=partial(below, trained, OURS, {"no smoothing": None}, 1.0, SEEDS),
        broken=partial(below, trained, Inverted(OURS), {"no smoothing": None}, 1.0, ONE),
    ),
    Claim(
        says="Half of the difficulty moved is better than none and than all of it: KL and perplexity are below those of alpha 0 and 1.",
        where=STRENGTH,
        scale=SCALE,
        check=partial(below, trained, OURS, ENDS, 1.0, SEEDS),
        broken=partial(below, trained, Inverted(OURS), ENDS, 1.0, ONE),
    ),
    Claim(
        says="W8A8 costs less than 1 % of perplexity, also with loud channels.",
        where=PAPER,
        scale=f"{SCALE}; as trained, and with loud channels",
        check=partial(percent, OURS, SEEDS),
        broken=partial(percent, Inverted(OURS), ONE),
    ),
)
