"""Claims of FP quantization, on a denoiser: floats of the best split and bias against whole numbers of the best range, one a tensor.

The integer version of the same pipeline has 2^b even steps with a zero, their range the share of least and greatest with the least squared
error, and no fewer bytes: a scale and a zero in the place of a scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, gathered, held, put, spread
from laconic.claims.quantize.dgq import Ranged, Shown, better, open_denoiser, shown
from laconic.core.claim import Claim, Lab, Paper
from laconic.core.packed import Packed
from laconic.core.site import Conv, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid, encode, fit_clipped
from laconic.methods.quantize.grid.flat import Flat
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.dgq import GroupedInputs
from laconic.methods.quantize.round.fpquant import Floating, FPQuant, Single, SplitBits

W8A8, W4A8 = SplitBits(8, 8), SplitBits(4, 8)
FLOATS = FPQuant()


@dataclass(frozen=True)
class Even(Transform):
    """Weights in whole numbers of one range, the share of both ends, of 20 down from 1, of least squared error."""

    acts_on = (Linear, Conv)
    level = Grid

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        flat = weights["weight"].float().reshape(1, -1)
        scale, zero = fit_clipped(flat, level, least=0.05, steps=20)
        inner = Grouped.of((1, flat.shape[1]), level, encode(flat, scale, zero, level), scale, zero)
        return Change(hold={site.tensors["weight"]: Flat(site.shape, inner)})

    def stored(self, site: Site, level: Grid) -> int:
        n, m = site.matrix
        return Grouped.bytes_of(1, n * m, level)


@dataclass(frozen=True)
class Integers(Transform):
    """The baseline: weights and inputs in whole numbers, one range each."""

    acts_on = (Linear,)
    level = SplitBits
    wants = Ranged.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: SplitBits) -> Change:
        grid = Grid(level.bits, None)
        if level.inputs is None:
            return Even()(site, weights, stats, grid)
        return Ranged(hold=Even(), clip=True)(site, weights, stats, GroupedInputs(grid, level.inputs, 1))

    def stored(self, site: Site, level: SplitBits) -> int:
        return Even().stored(site, Grid(level.bits, None))


@dataclass(frozen=True)
class Misbiased(Transform):
    """The stand-in: weights beyond a quarter of the greatest go there, as with a bias that is two too great."""

    acts_on = (Linear,)
    level = SplitBits
    wants = FLOATS.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: SplitBits) -> Change:
        weight = weights["weight"]
        end = weight.abs().max() / 4
        return FLOATS(site, {**weights, "weight": weight.clamp(-end, end)}, stats, level)

    def stored(self, site: Site, level: SplitBits) -> int:
        return FLOATS.stored(site, level)


def measured(bench: Bench, forms: Mapping[str, Packed], seed: int, quick: bool) -> Shown:
    """A denoiser with these forms."""
    model = bench.source.load(torch.float32)
    put(bench, model, forms)
    return shown(bench, model, sum(form.nbytes for form in forms.values()), seed, quick)


def nearest(bench: Bench, method: Transform, level: SplitBits, seed: int, quick: bool) -> Shown:
    """A method's result, measured once."""
    found: Shown = bench.once(
        ("nearest", method, level, seed, quick), lambda: measured(bench, held(bench, method, level, seed), seed, quick)
    )
    return found


def grid_of(form: Packed) -> Single | None:
    """The floats that a form holds weights in."""
    inner = form.inner if isinstance(form, Floating) else form
    return inner if isinstance(inner, Single) else None


# of images from the same noise, whose pixels lie in -1 to 1
CLEAR = 30.0


@gathered
def _eight(ours: Transform, seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """W8A8 looks as the original does."""
    bench = open_denoiser(lab.quick)
    found = [nearest(bench, ours, W8A8, seed, lab.quick) for seed in lab.draws(seeds)]
    ratios = [10 * math.log10(4 / max(one.image, 1e-12)) for one in found]
    wrong = [f"W8A8: images from the same noise are at {min(ratios):.1f} dB, below {CLEAR:g}"] if min(ratios) < CLEAR else []
    whole = [nearest(bench, Integers(), W8A8, seed, lab.quick).kl for seed in lab.draws(seeds)]
    numbers = {"W8A8: images to the original's, floats": spread(ratios, "dB")}
    numbers["W8A8: KL, floats"] = spread([one.kl for one in found], "nats/pixel")
    yield wrong, numbers | {"W8A8: KL, whole numbers": spread(whole, "nats/pixel")}


@gathered
def _floats(ours: Transform, level: SplitBits, seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """Floats against whole numbers, both to nearest."""
    bench = open_denoiser(lab.quick)
    mine, theirs = ([nearest(bench, method, level, seed, lab.quick) for seed in lab.draws(seeds)] for method in (ours, Integers()))
    yield better(f"W{level.bits}A{level.inputs}", mine, theirs, ("floats", "whole numbers"))


PAPER = Paper("Chen et al.", 2024, "arXiv:2408.06995", "section 5")
SCALE = "denoiser, matrices of the blocks and their inputs, one scale a tensor"
DRAWS = ", 16 steps of 24 chains, 3 draws of half the calibration states and of 40 images (quick: 16 chains, 20 images)"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With weights and inputs in floats of 8 bits, images from the same noise are at 30 dB or more to the original's.",
        where=PAPER,
        scale=SCALE + DRAWS,
        check=partial(_eight, FLOATS, SEEDS),
        broken=partial(_eight, Misbiased(), ONE),
    ),
    Claim(
        says="Floats have a lower KL than whole numbers in the same bits, and nearer images, at W8A8, all to nearest.",
        where=PAPER,
        scale=SCALE + DRAWS,
        check=partial(_floats, FLOATS, W8A8, SEEDS),
        broken=partial(_floats, Misbiased(), W8A8, ONE),
    ),
    Claim(
        says="Floats have a lower KL than whole numbers in the same bits, and nearer images, at W4A8, all to nearest.",
        where=PAPER,
        scale=SCALE + DRAWS,
        check=partial(_floats, FLOATS, W4A8, SEEDS),
        broken=partial(_floats, Misbiased(), W4A8, ONE),
    ),
)

__all__ = ["CLAIMS", "DRAWS", "FLOATS", "W4A8", "Integers", "grid_of", "measured", "nearest"]
