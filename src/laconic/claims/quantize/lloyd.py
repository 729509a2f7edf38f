"""Claims of Lloyd-Max levels: at equal bytes they beat even steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Found, change, duel, filling, held, judged, measure, on, seen, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Packed
from laconic.core.site import Linear, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.levels import Levels, encode, fit_scale
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.lloyd import Lloyd
from laconic.methods.quantize.round.rtn import RTN


@dataclass(frozen=True)
class Turned(Transform):
    """The stand-in: as many levels in the same bytes, dense where the fitted ones are rare and rare where they are dense."""

    acts_on = (Linear,)
    level = Levels
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Levels) -> Change:
        (form,) = Lloyd()(site, weights, stats, level).hold.values()
        assert isinstance(form, Leveled) and form.table is not None
        table = (form.table.sign() * (1 - form.table.abs())).sort().values
        weight = weights["weight"].reshape(site.matrix).float()
        scale = fit_scale(weight, level)
        return Change(hold={site.tensors["weight"]: Leveled.of(site.shape, level, encode(weight, scale, level, table), scale, None, table)})

    def stored(self, site: Site, level: Levels) -> int:
        return Lloyd().stored(site, level)


def _even(bench: Bench, level: Levels) -> dict[str, Packed]:
    """Every matrix rounded to even steps around zero, in the largest groups that need as many bytes or more."""

    def grids(m: int) -> Iterator[Grid]:
        return (Grid(level.bits, group, symmetric=True, zeros="half") for group in range(level.width(m), 0, -1))

    made: dict[str, Packed] = bench.once(("even", level), lambda: change(bench, filling(bench, Lloyd(), level, RTN(), grids)))
    return made


def _squares(bench: Bench, forms: Mapping[str, Packed]) -> float:
    """Squared error of all weights as a share of their squares."""
    error = whole = 0.0
    for name, form in forms.items():
        weight = bench.source.read(name).double().reshape(form.shape)
        error += float((form.dense().double() - weight).square().sum())
        whole += float(weight.square().sum())
    return error / whole


def _below(transform: Transform, seeds: Sequence[int], bench: Bench) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for level in (Levels.codebook(4), Levels.codebook(3)):
        label = f"{level.bits} bits"
        even = _even(bench, level)
        rival: Found = bench.once(("even, measured", level), partial(measure, bench, even))
        ours = [seen(bench, transform, level, seed) for seed in seeds]
        squares = [_squares(bench, held(bench, transform, level, seed)) for seed in seeds]
        theirs = _squares(bench, even)
        said, found = duel(label, ours, [rival], names=("Lloyd-Max", "even steps"))
        numbers |= found
        numbers[f"{label}: squared error, Lloyd-Max"] = spread(squares, "share")
        numbers[f"{label}: squared error, even steps"] = spread([theirs], "share")
        wrong += said
        if max(squares) >= theirs:
            wrong.append(f"{label}: squared error of Lloyd-Max is not below that of even steps")
        if any(one.bytes > rival.bytes for one in ours):
            wrong.append(f"{label}: Lloyd-Max has more bytes")
    return judged(wrong, numbers)


def _on(name: str, transform: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, partial(_below, transform, lab.draws(seeds)))


PAPER = Paper("Lloyd", 1982, "10.1109/TIT.1982.1056489", "section IV")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="In no more bytes, Lloyd-Max levels have a lower squared error, KL and perplexity than even steps at 4 and 3 bits.",
        where=PAPER,
        scale="nano, all matrices of the blocks, groups of 64 against groups of at most 64, both rounded to nearest, 3 draws of the rows",
        check=partial(_on, "nano", Lloyd(), SEEDS),
        broken=partial(_on, "nano", Turned(), ONE),
    ),
    Claim(
        says="In no more bytes, Lloyd-Max levels have a lower squared error, KL and perplexity than even steps, on a model of others.",
        where=PAPER,
        scale="stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits, groups as above, 3 draws of the rows",
        check=partial(_on, "stories260k", Lloyd(), SEEDS),
        broken=partial(_on, "stories260k", Turned(), ONE),
    ),
)
