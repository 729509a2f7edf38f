"""Claims of LLM-FP4: weights and inputs in 4 bits, with exponents of the input channels, without, and whole numbers in the same bytes.

Whole numbers of 4 bits are the format e1m2: sign and magnitude, 0 to 7 in halves. Channels are made loud by exact powers of two: some of
each norm, with what reads them quieter by as much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, as_trained, duel, gathered, held, judged, louder, on, seen, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Packed
from laconic.core.site import Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.levels import encode, fit_clipped, fit_scale
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.llmfp4 import LLMFP4, FloatBits, Floating, pre_shifted, row_of, shares

W4A4 = FloatBits(4, 4)
OURS, SEARCHED = LLMFP4(), LLMFP4(shift=False)


@dataclass(frozen=True)
class Integers(Transform):
    """The baseline: whole numbers, a scale a row of weights and one for all inputs; from the greatest number, or (clip) from the share of
    it that makes the squared error of weights and of inputs least, each by itself."""

    clip: bool = True

    acts_on = (Linear,)
    level = FloatBits
    wants = OURS.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: FloatBits) -> Change:
        weight, levels = weights["weight"].reshape(site.matrix).float(), row_of("e1m2")
        inputs, peaks = (stats[kind] for kind in self.wants)
        scale = fit_clipped(weight, levels, None, steps=16) if self.clip else fit_scale(weight, levels)
        feeds = [pre_shifted(peaks, levels, share, False) for share in (shares(19) if self.clip else [1.0])]
        feed = min(feeds, key=lambda one: float((one(inputs) - inputs).double().square().sum()))
        inner = Leveled.of(site.shape, levels, encode(weight, scale, levels, None), scale, None, None)
        return Change(hold={site.tensors["weight"]: Floating(inner, "e1m2", feed.shifts, feed.scale)})

    def stored(self, site: Site, level: FloatBits) -> int:
        return OURS.stored(site, level)


@dataclass(frozen=True)
class Misplaced(Transform):
    """The stand-in: every input channel has the exponent of the channel before it."""

    acts_on = (Linear,)
    level = FloatBits
    wants = OURS.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: FloatBits) -> Change:
        (form,) = OURS(site, weights, stats, level).hold.values()
        assert isinstance(form, Floating)
        return Change(hold={site.tensors["weight"]: Floating(form.inner, form.table, form.shifts.roll(1), form.scale)})

    def stored(self, site: Site, level: FloatBits) -> int:
        return OURS.stored(site, level)


Make = Callable[[Bench, int], Bench]


@gathered
def _ordered(bench: Bench, make: Make, ours: Transform, seeds: Sequence[int]) -> Iterator[Duel]:
    """Each loses less than the next."""
    benches = [make(bench, seed) for seed in seeds]

    def of(method: Transform) -> list[Found]:
        return [seen(one, method, W4A4, seed) for one, seed in zip(benches, seeds, strict=True)]

    names = ("with exponents of channels", "searched floats", "clipped integers")
    found = [of(method) for method in (ours, SEARCHED, Integers())]
    for at in (0, 1):
        yield duel("W4A4", found[at], found[at + 1], names=(names[at], names[at + 1]))
    yield [], {"W4A4: KL, integers from the greatest number": spread([one.kl for one in of(Integers(clip=False))], "nats/token")}


def _folds(bench: Bench, misplaced: bool) -> Verdict:
    """Outputs with the exponents in the weights, and with factors at the inputs, on real matrices and drawn inputs of their loudness."""
    forms = held(louder(bench, 0), OURS, W4A4)
    same, generator = [], torch.Generator().manual_seed(0)
    for form in forms.values():
        assert isinstance(form, Floating)
        feed, folded = form.feed, _turned(form) if misplaced else form.folded()
        loud = feed.scale * feed.levels.top * 2.0 ** -feed.shifts.float()
        x = torch.randn(64, form.matrix[1], generator=generator) * loud
        same.append(torch.equal(F.linear(feed.shifted(feed(x)), folded.dense()), F.linear(feed(x), form.dense())))
    numbers = {"matrices with the same bits": Measurement(sum(same) / len(same), "share", len(same))}
    return judged([] if all(same) else [f"{len(same) - sum(same)} of {len(same)} matrices give other bits"], numbers)


def _turned(form: Floating) -> Packed:
    return Floating(form.inner, form.table, form.shifts.roll(1), form.scale).folded()


def _on(name: str, make: Make, ours: Transform, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _ordered(bench, make, ours, lab.draws(seeds)))


def _folded(name: str, misplaced: bool, lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _folds(bench, misplaced))


PAPER = Paper("Liu et al.", 2023, "arXiv:2310.16836", "section 4, table 1")
LOUD = ", 4 channels of each norm 16 times louder, 3 draws of these and of the calibration rows"
DRAWS = ", 3 draws of the calibration rows"
NANO = "nano, all matrices of the blocks and their inputs in 4 bits"
STORIES = "stories260k on TinyStories, all matrices of the blocks and their inputs in 4 bits"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With loud input channels, floats with an exponent for each input channel lose less KL and perplexity than searched floats "
        "without, and these less than integers clipped for least squared error.",
        where=PAPER,
        scale=NANO + LOUD,
        check=partial(_on, "nano", louder, OURS, SEEDS),
        broken=partial(_on, "nano", louder, Misplaced(), ONE),
    ),
    Claim(
        says="As trained too, floats with an exponent for each input channel lose less KL and perplexity than searched floats without, and "
        "these less than integers clipped for least squared error.",
        where=PAPER,
        scale=NANO + DRAWS,
        check=partial(_on, "nano", as_trained, OURS, SEEDS),
        broken=partial(_on, "nano", as_trained, Misplaced(), ONE),
    ),
    Claim(
        says="With loud input channels, exponents of input channels lose less than searched floats, and these less than clipped integers, "
        "on a model of others.",
        where=PAPER,
        scale=STORIES + LOUD,
        check=partial(_on, "stories260k", louder, OURS, SEEDS),
        broken=partial(_on, "stories260k", louder, Misplaced(), ONE),
    ),
    Claim(
        says="As trained too, exponents of input channels lose less than searched floats, and these less than clipped integers, on a model "
        "of others.",
        where=PAPER,
        scale=STORIES + DRAWS,
        check=partial(_on, "stories260k", as_trained, OURS, SEEDS),
        broken=partial(_on, "stories260k", as_trained, Misplaced(), ONE),
    ),
    Claim(
        says="Exponents of input channels that stand in the weights give the same bits as factors at the inputs.",
        where=Paper("Liu et al.", 2023, "arXiv:2310.16836", "section 4.2"),
        scale="stories260k with loud norms, all matrices of the blocks, 64 drawn inputs each",
        check=partial(_folded, "stories260k", False),
        broken=partial(_folded, "stories260k", True),
    ),
)
