"""Claims of ranges cut by the output: the same grid as round to nearest, so the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, duel, gathered, on, seen
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.methods.quantize.round.clipped import Clipped
from laconic.methods.quantize.round.rtn import RTN


@dataclass(frozen=True)
class Blind(Transform):
    """The stand-in: every range cut to half, whatever it does to the output."""

    acts_on = (Linear,)
    level = Grid

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        weight = weights["weight"].float().reshape(site.matrix)
        cut = weight.abs().amax(1, keepdim=True) / 2
        return RTN()(site, {"weight": torch.minimum(torch.maximum(weight, -cut), cut)}, stats, level)

    def stored(self, site: Site, level: Grid) -> int:
        return RTN().stored(site, level)


@gathered
def _compare(bench: Bench, transform: Transform, other: Transform, names: tuple[str, str], seeds: Sequence[int]) -> Iterator[Duel]:
    for level in (Grid(4, 64), Grid(3, 64)):
        ours = [seen(bench, transform, level, seed) for seed in (seeds if transform.wants else ONE)]
        yield duel(f"{level.bits} bits in groups of {level.group}", ours, [seen(bench, other, level)], names=names)


def _below(model: str, transform: Transform, other: Transform, name: str, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, model, lambda bench: _compare(bench, transform, other, ("cut by the output", name), lab.draws(seeds)))


PAPER = Paper("Lin et al.", 2023, "arXiv:2306.00978", "section 3.2")
WHERE = "stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits in groups of 64, 3 draws of the calibration rows"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 4 and 3 bits, ranges cut by the output have a lower KL and perplexity than whole ones.",
        where=PAPER,
        scale=WHERE,
        check=partial(_below, "stories260k", Clipped(), RTN(), "whole ranges", SEEDS),
        broken=partial(_below, "stories260k", Blind(), RTN(), "whole ranges", ONE),
    ),
    Claim(
        says="At 4 and 3 bits, ranges cut by the output have a lower KL and perplexity than ranges cut by the weights' own error.",
        where=PAPER,
        scale=WHERE,
        check=partial(_below, "stories260k", Clipped(), RTN(clip=True), "cut by the weights' error", SEEDS),
        broken=partial(_below, "stories260k", Blind(), RTN(clip=True), "cut by the weights' error", ONE),
    ),
)
