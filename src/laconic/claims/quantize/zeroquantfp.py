"""Claims of GPTQ's walk with floats of 4 bits: the same form as round to nearest, so the same bytes."""

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
from laconic.kernels.levels import Levels
from laconic.methods.quantize.round.floats import Floats
from laconic.methods.quantize.round.zeroquantfp import ZeroQuantFP


@dataclass(frozen=True)
class Misled(Transform):
    """The stand-in: the Hessian of shuffled channels, so that errors are pushed onto the wrong weights."""

    acts_on = (Linear,)
    level = Levels
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Levels) -> Change:
        gram = stats[Gram()]
        order = torch.randperm(gram.shape[0], generator=torch.Generator().manual_seed(0))
        return ZeroQuantFP()(site, weights, {Gram(): gram[order][:, order]}, level)

    def stored(self, site: Site, level: Levels) -> int:
        return ZeroQuantFP().stored(site, level)


@gathered
def _compare(transform: Transform, seeds: Sequence[int], bench: Bench) -> Iterator[Duel]:
    for label, level in (("MXFP4", Levels.mxfp4()), ("NVFP4", Levels.nvfp4())):
        ours = [seen(bench, transform, level, seed) for seed in seeds]
        yield duel(label, ours, [seen(bench, Floats(), level)], names=("ZeroQuant-FP", "round to nearest"))


def _on(name: str, transform: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, partial(_compare, transform, lab.draws(seeds)))


PAPER = Paper("Wu et al.", 2023, "arXiv:2307.09782", "section 4")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="In MXFP4 and NVFP4, the walk over columns loses less KL and perplexity than rounding to nearest.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "nano", ZeroQuantFP(), SEEDS),
        broken=partial(_on, "nano", Misled(), ONE),
    ),
    Claim(
        says="In MXFP4 and NVFP4, the walk over columns loses less KL and perplexity than rounding to nearest, on a model of others.",
        where=PAPER,
        scale="stories260k on TinyStories, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "stories260k", ZeroQuantFP(), SEEDS),
        broken=partial(_on, "stories260k", Misled(), ONE),
    ),
)
