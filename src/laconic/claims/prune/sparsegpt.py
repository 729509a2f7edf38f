"""Claims of SparseGPT: as many weights in as many bytes as dropping by a score, and bits with zeros against fewer bits at equal bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, judged, on, run, seen
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Conv, Linear, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.methods.prune.cut.drop import Drop, Sparsity
from laconic.methods.prune.cut.sparsegpt import SparseGPT
from laconic.methods.prune.score.magnitude import Magnitude
from laconic.methods.prune.score.wanda import Wanda
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.rtn import RTN


@dataclass(frozen=True)
class Misled(Transform):
    """The stand-in: SparseGPT with the Hessian of shuffled channels, so that the wrong weights go and errors are pushed astray."""

    acts_on = (Linear, Conv)
    level = Sparsity
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Sparsity) -> Change:
        gram = stats[Gram()]
        order = torch.randperm(gram.shape[0], generator=torch.Generator().manual_seed(0))
        return SparseGPT(RTN())(site, weights, {Gram(): gram[order][:, order]}, level)

    def stored(self, site: Site, level: Sparsity) -> int:
        return SparseGPT(RTN()).stored(site, level)


@dataclass(frozen=True)
class Afterwards(Transform):
    """The baseline of the joint sweep: SparseGPT, then round to nearest what stayed."""

    acts_on = (Linear, Conv)
    level = Sparsity
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Sparsity) -> Change:
        # a row keeps as many in each block as in the joint sweep, since both are asked for a grid; this one is too fine to be felt
        fine = Sparsity(level.keep, level.run, Grid(8, 8))
        pruned = SparseGPT(RTN())(site, weights, stats, fine).hold[site.tensors["weight"]].dense()
        return Drop(Magnitude(), RTN())(site, {"weight": pruned}, {}, level)

    def stored(self, site: Site, level: Sparsity) -> int:
        return SparseGPT(RTN()).stored(site, level)


@gathered
def _below(bench: Bench, ours: Transform, theirs: Drop, seeds: Sequence[int], levels: Mapping[str, Sparsity]) -> Iterator[Duel]:
    for label, level in levels.items():
        rival = [seen(bench, theirs, level, seed) for seed in (seeds if theirs.wants else ONE)]
        name = type(theirs.score).__name__
        yield duel(label, [seen(bench, ours, level, seed) for seed in seeds], rival, names=("SparseGPT", name))


def _on(name: str, rival: Drop, levels: Mapping[str, Sparsity], ours: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _below(bench, ours, rival, lab.draws(seeds), levels))


def _bits(bench: Bench, ours: Transform, group: int | None, seeds: Sequence[int]) -> Verdict:
    """Half of the weights in 4 bits against GPTQ on all of them in 3, whose groups are made as fine as the same bytes allow."""
    level = Sparsity(0.5, None, Grid(4, group))

    def dense(site: Site) -> tuple[Transform, Grid] | None:
        if bench.linears(ours, level)(site) is None:
            return None
        limit = ours.stored(site, level)
        return GPTQ(), Grid(3, next((g for g in range(8, site.matrix[1] + 1) if GPTQ().stored(site, Grid(3, g)) <= limit), None))

    def rival(seed: int) -> Found:
        found: Found = bench.once(("3 bits", group, seed), partial(run, bench, dense, seed))
        return found

    label = "one scale a row" if group is None else f"groups of {group} kept weights"
    found = [seen(bench, ours, level, seed) for seed in seeds]
    return judged(*duel(label, found, [rival(seed) for seed in seeds], names=("half in 4 bits", "all in 3 bits by GPTQ")))


def _bits_on(name: str, group: int | None, ours: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _bits(bench, ours, group, lab.draws(seeds)))


@gathered
def _joint(bench: Bench, ours: Transform, seeds: Sequence[int]) -> Iterator[Duel]:
    for label, level in {"50 % of each row": Sparsity(0.5), "2 of each 4": Sparsity(0.5, 4)}.items():
        joint = Sparsity(level.keep, level.run, Grid(3, 64))
        pairs = [[seen(bench, method, joint, seed) for seed in seeds] for method in (ours, Afterwards())]
        yield duel(f"{label} in 3 bits", *pairs, names=("jointly", "one after the other"))


PAPER = Paper("Frantar and Alistarh", 2023, "arXiv:2301.00774", "section 4")
JOINT = Paper("Frantar and Alistarh", 2023, "arXiv:2301.00774", "section 3.5 and joint sparsification and quantization")
WANDA = Paper("Sun et al.", 2023, "arXiv:2306.11695", "section 4.2, table 3")
FREE = {"50 %": Sparsity(0.5)}
RUNS = {"4 of each 8": Sparsity(0.5, 8), "2 of each 4": Sparsity(0.5, 4)}

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 50 %, 4:8 and 2:4, SparseGPT's KL and perplexity are below those of magnitude pruning.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "nano", Drop(Magnitude()), FREE | RUNS, SparseGPT(), SEEDS),
        broken=partial(_on, "nano", Drop(Magnitude()), FREE | RUNS, Misled(), ONE),
    ),
    Claim(
        says="At 50 %, SparseGPT's KL and perplexity are below those of Wanda.",
        where=WANDA,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "nano", Drop(Wanda()), FREE, SparseGPT(), SEEDS),
        broken=partial(_on, "nano", Drop(Wanda()), FREE, Misled(), ONE),
    ),
    Claim(
        says="At 4:8 and 2:4, SparseGPT's KL and perplexity are below those of Wanda.",
        where=WANDA,
        scale="nano, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "nano", Drop(Wanda()), RUNS, SparseGPT(), SEEDS),
        broken=partial(_on, "nano", Drop(Wanda()), RUNS, Misled(), ONE),
    ),
    Claim(
        says="On a model trained by others, SparseGPT's KL and perplexity are below those of Wanda at 50 %, 4:8 and 2:4.",
        where=WANDA,
        scale="stories260k on TinyStories, all matrices of the blocks, 3 draws of the calibration rows",
        check=partial(_on, "stories260k", Drop(Wanda()), FREE | RUNS, SparseGPT(), SEEDS),
        broken=partial(_on, "stories260k", Drop(Wanda()), FREE | RUNS, Misled(), ONE),
    ),
    Claim(
        says="At equal bytes and one scale a row, half of the weights in 4 bits lose less KL and perplexity than all in 3 bits by GPTQ.",
        where=JOINT,
        scale="nano, all matrices of the blocks, masks counted as bytes, 3 draws of the calibration rows",
        check=partial(_bits_on, "nano", None, SparseGPT(RTN()), SEEDS),
        broken=partial(_bits_on, "nano", None, Misled(), ONE),
    ),
    Claim(
        says="At equal bytes and in groups, half of the weights in 4 bits lose less KL and perplexity than all in 3 bits by GPTQ.",
        where=JOINT,
        scale="nano, all matrices of the blocks, groups of 64 kept weights against groups as fine as the bytes allow, masks counted as "
        "bytes, 3 draws of the calibration rows",
        check=partial(_bits_on, "nano", 64, SparseGPT(RTN()), SEEDS),
        broken=partial(_bits_on, "nano", 64, Misled(), ONE),
    ),
    Claim(
        says="Pruning and rounding in one sweep loses less KL and perplexity than rounding to nearest what the sweep left.",
        where=JOINT,
        scale="nano, all matrices of the blocks, 50 % and 2:4, 3 bits in groups of 64 kept weights, 3 draws of the calibration rows",
        check=lambda lab: on(lab, "nano", lambda bench: _joint(bench, SparseGPT(RTN()), lab.draws(SEEDS))),
        broken=lambda lab: on(lab, "nano", lambda bench: _joint(bench, Misled(), ONE)),
    ),
)
