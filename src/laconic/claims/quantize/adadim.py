"""Claims of AdaDim: groups within output channels, within input channels, or the better of both for each matrix, in the same bytes.

Only matrices in which both ways take the same bytes are rounded. Channels are made loud by exact powers of two: of each norm some, with
what reads them quieter by as much (loud inputs), or of each up and value projection some outputs, with what reads them quieter (loud
outputs before, loud inputs behind)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

from torch import Tensor

from laconic.claims.lab import (
    CHANNELS,
    LOUDER,
    ONE,
    SEEDS,
    Bench,
    Duel,
    Found,
    as_trained,
    change,
    duel,
    gathered,
    layer_error,
    loud_rows,
    louder,
    measure,
    on,
    rescaled,
    spread,
)
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.packed import Packed, Transposed
from laconic.core.site import Linear, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.obs import output_error
from laconic.methods.quantize.round.adadim import AdaDim

WAYS: tuple[Literal["output"], Literal["input"]] = ("output", "input")
# where both ways take the same bytes: on nano everywhere, on stories260k in the matrices of attention
LEVELS = {"nano": (Grid(3, 32), Grid(3, 128)), "stories260k": (Grid(3, 16),)}


@dataclass(frozen=True)
class Contrary(Transform):
    """The stand-in: of both ways the one that errs more."""

    ours: AdaDim

    acts_on = (Linear,)
    level = Grid
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        made = [replace(self.ours, groups=way)(site, weights, stats, level) for way in WAYS]

        def error(one: Change) -> float:
            return float(output_error(one.hold[site.tensors["weight"]].dense() - weights["weight"], stats[Gram()]).sum())

        return max(made, key=error)

    def stored(self, site: Site, level: Grid) -> int:
        return self.ours.stored(site, level)


def _held(bench: Bench, transform: Transform, level: Grid, seed: int) -> dict[str, Packed]:
    """The matrices of the blocks that take the same bytes either way."""
    ways = [AdaDim(groups=way) for way in WAYS]
    every = bench.linears(transform, level)

    def choose(site: Site) -> tuple[Transform, Grid] | None:
        return every(site) if len({way.stored(site, level) for way in ways}) == 1 else None

    made: dict[str, Packed] = bench.once(("held", transform, level, seed), lambda: change(bench, choose, seed))
    return made


def _seen(bench: Bench, transform: Transform, level: Grid, seed: int) -> Found:
    found: Found = bench.once(("seen", transform, level, seed), lambda: measure(bench, _held(bench, transform, level, seed)))
    return found


def _rows(bench: Bench, seed: int) -> Bench:
    return rescaled(bench, ("rows", seed), partial(loud_rows, seed=seed, factor=LOUDER, count=CHANNELS))


Make = Callable[[Bench, int], Bench]


@gathered
def _better(bench: Bench, lab: Lab, make: Make, broken: bool, seeds: Sequence[int]) -> Iterator[Duel]:
    """Against both ways everywhere: the error of layers; against groups within output channels: KL and perplexity."""
    benches = [(make(bench, seed), seed) for seed in seeds]
    for level, compensate in product(LEVELS[bench.name][: 1 if lab.quick else None], (False, True)):
        label = f"{'GPTQ' if compensate else 'to nearest'}, {level.bits} bits, groups of {level.group}"
        fixed = {way: AdaDim(groups=way, compensate=compensate) for way in WAYS}
        method = AdaDim(compensate=compensate)
        ours: Transform = Contrary(method) if broken else method
        errors = {
            name: [layer_error(one, _held(one, how, level, seed)) for one, seed in benches]
            for name, how in (("chosen", ours), *fixed.items())
        }
        wrong = [
            f"{label}: the layers' error is not at or below that of groups within {way} channels"
            for way in fixed
            if any(a > b for a, b in zip(errors["chosen"], errors[way], strict=True))
        ]
        yield wrong, {f"{label}: layer error, {name}": spread(values, "share") for name, values in errors.items()}
        chosen, usual, inner = ([_seen(one, how, level, s) for one, s in benches] for how in (ours, fixed["output"], fixed["input"]))
        yield duel(label, chosen, usual, names=("AdaDim", "groups within output channels"))
        yield [], {f"{label}: KL, groups within input channels": spread([one.kl for one in inner], "nats/token")}


@gathered
def _chooses(bench: Bench, lab: Lab, ours: Transform, seeds: Sequence[int]) -> Iterator[Duel]:
    """Where outputs are loud groups lie within output channels, and in what reads them within input channels."""
    level = LEVELS[bench.name][0]
    for part, turned in ((("up", "v"), False), (("down", "o"), True)):
        shares = []
        for seed in seeds:
            one = _rows(bench, seed)
            forms = _held(one, ours, level, seed)
            names = [site.tensors["weight"].name for site in one.source.anatomy.sites(Linear) if site.roles["part"] in part]
            right = [isinstance(forms[name], Transposed) == turned for name in names if name in forms]
            shares.append(sum(right) / len(right))
        label = f"{' and '.join(part)}: groups within {'input' if turned else 'output'} channels"
        yield ([] if min(shares) == 1 else [f"{label} are not chosen everywhere"]), {label: spread(shares, "share")}


def _on(name: str, make: Make, broken: bool, lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _better(bench, lab, make, broken, ONE if broken else lab.draws(SEEDS)))


def _choice(name: str, broken: bool, lab: Lab) -> Verdict:
    ours: Transform = Contrary(AdaDim(compensate=False)) if broken else AdaDim(compensate=False)
    return on(lab, name, lambda bench: _chooses(bench, lab, ours, ONE if broken else lab.draws(SEEDS)))


PAPER = Paper("Heo et al.", 2023, "arXiv:2309.15531", "section 3, table 2")
NANO = "nano, all matrices of the blocks, 3 bits in groups of 32 (in full also 128), to nearest and by GPTQ"
STORIES = "stories260k on TinyStories, matrices of attention, 3 bits in groups of 16, to nearest and by GPTQ"
LOUD = ", 4 channels of each norm 16 times louder, 3 draws of these and of the calibration rows"
DRAWS = ", 3 draws of the calibration rows"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With loud input channels, choosing groups for each matrix errs no more in its layers than either way everywhere, and has a "
        "lower KL and perplexity than groups within output channels.",
        where=PAPER,
        scale=NANO + LOUD,
        check=partial(_on, "nano", louder, False),
        broken=partial(_on, "nano", louder, True),
    ),
    Claim(
        says="As trained too, choosing groups for each matrix errs no more in its layers than either way everywhere, and has a lower KL "
        "and perplexity than groups within output channels.",
        where=PAPER,
        scale=NANO + DRAWS,
        check=partial(_on, "nano", as_trained, False),
        broken=partial(_on, "nano", as_trained, True),
    ),
    Claim(
        says="With loud input channels, choosing groups errs no more than either way everywhere, and loses less than groups within output "
        "channels, on a model of others.",
        where=PAPER,
        scale=STORIES + LOUD,
        check=partial(_on, "stories260k", louder, False),
        broken=partial(_on, "stories260k", louder, True),
    ),
    Claim(
        says="As trained too, choosing groups errs no more than either way everywhere, and loses less than groups within output channels, "
        "on a model of others.",
        where=PAPER,
        scale=STORIES + DRAWS,
        check=partial(_on, "stories260k", as_trained, False),
        broken=partial(_on, "stories260k", as_trained, True),
    ),
    Claim(
        says="Matrices with loud outputs get groups within output channels, those that read them within input channels.",
        where=Paper("Heo et al.", 2023, "arXiv:2309.15531", "section 3.3"),
        scale="nano, up, value, down and output projections, 4 outputs of up and value 16 times louder, 3 draws; round to nearest",
        check=partial(_choice, "nano", False),
        broken=partial(_choice, "nano", True),
    ),
)
