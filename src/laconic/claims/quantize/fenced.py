"""Claims of CFP for weights: ranges that end where outliers begin against whole ones, on one grid in the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from laconic.claims.lab import Bench, Duel, duel, gathered, on, seen
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Conv, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.methods.quantize.round.fenced import Fenced
from laconic.methods.quantize.round.rtn import RTN


@dataclass(frozen=True)
class Halved(Transform):
    """The stand-in: every weight is cut at a quarter of its matrix's mean size."""

    acts_on = (Linear, Conv)
    level = Grid

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        t = float(weights["weight"].abs().mean()) / 4
        return RTN()(site, {"weight": weights["weight"].clamp(-t, t)}, stats, level)

    def stored(self, site: Site, level: Grid) -> int:
        return RTN().stored(site, level)


@gathered
def _below(ours: Transform, rival: Transform, bits: tuple[int, ...], bench: Bench) -> Iterator[Duel]:
    for each in bits:
        found = [[seen(bench, method, Grid(each, None))] for method in (ours, rival)]
        yield duel(
            f"{each} bits", *found, names=("ranges cut at outliers", "whole ranges" if rival == RTN() else "ranges by the weights' error")
        )


def below(name: str, ours: Transform, rival: Transform, bits: tuple[int, ...], lab: Lab) -> Verdict:
    """A lower KL and perplexity than another way to fit the same grid."""
    return on(lab, name, partial(_below, ours, rival, bits))


PAPER = Paper("Ding et al.", 2023, "arXiv:2312.07950", "section 4, coarse-to-fine preprocessing")
SCALE = "all matrices of the blocks, one scale a row, no chance in it"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 3 and 2 bits, ranges cut where outliers begin have a lower KL and perplexity than whole ranges.",
        where=PAPER,
        scale=f"nano, {SCALE}",
        check=partial(below, "nano", Fenced(), RTN(), (3, 2)),
        broken=partial(below, "nano", Halved(), RTN(), (3, 2)),
    ),
    Claim(
        says="At 3 and 2 bits, ranges cut where outliers begin have a lower KL and perplexity than whole ranges, on a model trained "
        "by others.",
        where=PAPER,
        scale=f"stories260k on TinyStories, {SCALE}",
        check=partial(below, "stories260k", Fenced(), RTN(), (3, 2)),
        broken=partial(below, "stories260k", Halved(), RTN(), (3, 2)),
    ),
)
