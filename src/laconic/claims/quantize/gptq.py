"""Claims of GPTQ: the same grid as round to nearest, so the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, duel, gathered, on, seen
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Linear, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.obs import inverse_factor, round_columns
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.rtn import RTN


@dataclass(frozen=True)
class Misled(Transform):
    """The stand-in: GPTQ with the Hessian of shuffled channels, so that errors are pushed onto the wrong weights."""

    acts_on = (Linear,)
    level = Grid
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        gram = stats[Gram()]
        order = torch.randperm(gram.shape[0], generator=torch.Generator().manual_seed(0))
        return GPTQ()(site, weights, {Gram(): gram[order][:, order]}, level)

    def stored(self, site: Site, level: Grid) -> int:
        return GPTQ().stored(site, level)


@dataclass(frozen=True)
class Quietest(Transform):
    """The stand-in: columns from the quietest to the loudest, so that the loudest take up all errors of the others."""

    acts_on = (Linear,)
    level = Grid
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        gram, weight = stats[Gram()], weights["weight"].reshape(site.matrix)
        order = torch.argsort(gram.diagonal(), stable=True)
        (found,) = round_columns(weight, inverse_factor(gram[order][:, order]), [level], order=order)
        return Change(hold={site.tensors["weight"]: Grouped.of(site.shape, level, *found)})

    def stored(self, site: Site, level: Grid) -> int:
        return GPTQ().stored(site, level)


@gathered
def _compare(bench: Bench, transform: Transform, seeds: Sequence[int], levels: Sequence[Grid], factor: float) -> Iterator[Duel]:
    for level in levels:
        label = f"{level.bits} bits, {'one scale a row' if level.group is None else f'groups of {level.group}'}"
        nearest = seen(bench, RTN(), level)
        ours = [seen(bench, transform, level, seed) for seed in seeds]
        yield duel(label, ours, [nearest], names=("GPTQ", "round to nearest"), factor=factor)


def _below(name: str, transform: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    levels = [Grid(4, None), Grid(3, None)] if lab.quick else [Grid(bits, group) for bits in (4, 3) for group in (None, 128)]
    return on(lab, name, lambda bench: _compare(bench, transform, lab.draws(seeds), levels, 1.0))


def _well_below(transform: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, "nano", lambda bench: _compare(bench, transform, lab.draws(seeds), [Grid(3, 128)], 1.5))


@gathered
def _ordered(bench: Bench, transform: Transform, seeds: Sequence[int], levels: Sequence[Grid]) -> Iterator[Duel]:
    for level in levels:
        label = f"{level.bits} bits, {'one scale a row' if level.group is None else f'groups of {level.group}'}"
        ours, theirs = ([seen(bench, one, level, seed) for seed in seeds] for one in (transform, GPTQ()))
        yield duel(label, ours, theirs, names=("loudest column first", "as stored"))


def _first(name: str, transform: Transform, seeds: Sequence[int], groups: Sequence[int | None], lab: Lab) -> Verdict:
    levels = [Grid(bits, group) for group in groups for bits in (4, 3)]
    return on(lab, name, lambda bench: _ordered(bench, transform, lab.draws(seeds), levels))


ORDERED = GPTQ(order="activation")
PAPER = Paper("Frantar et al.", 2023, "arXiv:2210.17323", "section 4")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 4 and 3 bits, GPTQ loses less KL and perplexity than rounding to nearest on the same grid.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_below, "nano", GPTQ(), SEEDS),
        broken=partial(_below, "nano", Misled(), ONE),
    ),
    Claim(
        says="At 3 bits in groups of 128, GPTQ's KL is at most 1 / 1.5 of that of rounding to nearest.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_well_below, GPTQ(), SEEDS),
        broken=partial(_well_below, Misled(), ONE),
    ),
    Claim(
        says="At 4 and 3 bits, GPTQ loses less KL and perplexity than rounding to nearest on the same grid, on a model trained by others.",
        where=PAPER,
        scale="stories260k on TinyStories, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_below, "stories260k", GPTQ(), SEEDS),
        broken=partial(_below, "stories260k", Misled(), ONE),
    ),
    Claim(
        says="With one scale a row, columns visited from the loudest on lose less KL and perplexity than as they are stored.",
        where=PAPER,
        scale="stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits, 3 draws of the calibration rows",
        check=partial(_first, "stories260k", ORDERED, SEEDS, (None,)),
        broken=partial(_first, "stories260k", Quietest(), ONE, (None,)),
    ),
    Claim(
        says="In groups too, whose scales are then found beforehand and not on the way, that order loses less KL and perplexity.",
        where=PAPER,
        scale="stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits in groups of 32, 3 draws of the calibration rows",
        check=partial(_first, "stories260k", ORDERED, SEEDS, (32,)),
        broken=partial(_first, "stories260k", Quietest(), ONE, (32,)),
    ),
)
