"""Claims of CFP for inputs: what is rounded has the same grids with and without it, so the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from laconic.claims.lab import CHANNELS, LOUDER, ONE, SEEDS, Bench, Duel, as_trained, duel, gathered, louder, on
from laconic.claims.quantize.awq import Inverted, compressed
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.transform import Align
from laconic.kernels.grids import Grid
from laconic.methods.quantize.round.inputs import Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.smooth.cfp import CFP
from laconic.methods.quantize.smooth.smoothquant import SmoothQuant

METHOD, W4A4, W4A8 = Inputs(RTN(clip=True)), WeightAndInputs(Grid(4, None), 4), WeightAndInputs(Grid(4, None), 8)
OURS = CFP()
Where = Callable[[Bench, int], Bench]
Rival = tuple[str, Align | None]


@gathered
def _below(where: Where, ours: Align, rival: Rival, factor: float, seeds: Sequence[int], quick: bool, bench: Bench) -> Iterator[Duel]:
    # in a quick run of nano one draw
    seeds = seeds[:1] if quick and bench.name == "nano" else seeds
    for label, level in (("W4A4", W4A4), ("W4A8", W4A8)):
        mine, theirs = ([compressed(where(bench, seed), how, METHOD, level, seed) for seed in seeds] for how in (ours, rival[1]))
        yield duel(label, mine, theirs, names=("CFP", rival[0]), factor=factor)


def below(name: str, where: Where, ours: Align, rival: Rival, factor: float, seeds: Sequence[int], lab: Lab) -> Verdict:
    """A lower KL and perplexity than with another alignment, or with none."""
    return on(lab, name, partial(_below, where, ours, rival, factor, lab.draws(seeds), lab.quick))


PAPER = Paper("Ding et al.", 2023, "arXiv:2312.07950", "section 4, coarse-to-fine preprocessing")
LOUD = f"{CHANNELS} channels behind each norm {LOUDER:g} times as loud, drawn by the seed"
SCALE = "all matrices of the blocks, one scale a row, inputs in 4 and 8 bits by one scale a token, 3 draws of the calibration rows"
NONE: Rival = ("none", None)
SMOOTH: Rival = ("SmoothQuant", SmoothQuant(inner=True))

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With a few loud channels, the KL of W4A4 and W4A8 is at most 1 / 1.5 of that without.",
        where=PAPER,
        scale=f"stories260k on TinyStories, {SCALE}; {LOUD}",
        check=partial(below, "stories260k", louder, OURS, NONE, 1.5, SEEDS),
        broken=partial(below, "stories260k", louder, Inverted(OURS), NONE, 1.5, ONE),
    ),
    Claim(
        says="With a few loud channels, the KL and perplexity of W4A4 and W4A8 are below those without, on another model.",
        where=PAPER,
        scale=f"nano, {SCALE} (quick: 1); {LOUD}",
        check=partial(below, "nano", louder, OURS, NONE, 1.0, SEEDS),
        broken=partial(below, "nano", louder, Inverted(OURS), NONE, 1.0, ONE),
    ),
    Claim(
        says="With a few loud channels, the KL and perplexity of W4A4 and W4A8 are below those with SmoothQuant.",
        where=PAPER,
        scale=f"stories260k on TinyStories, {SCALE}; {LOUD}",
        check=partial(below, "stories260k", louder, OURS, SMOOTH, 1.0, SEEDS),
        broken=partial(below, "stories260k", louder, Inverted(OURS), SMOOTH, 1.0, ONE),
    ),
    Claim(
        says="On the model as it was trained, the KL and perplexity of W4A4 and W4A8 are below those without.",
        where=PAPER,
        scale=f"stories260k on TinyStories, {SCALE}",
        check=partial(below, "stories260k", as_trained, OURS, NONE, 1.0, SEEDS),
        broken=partial(below, "stories260k", as_trained, Inverted(OURS), NONE, 1.0, ONE),
    ),
)
