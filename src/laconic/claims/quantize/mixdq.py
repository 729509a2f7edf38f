"""Claims of MixDQ's inputs, on a generator of one step whose captions begin with a word that is far louder than all others, as those of
the large text-to-image models do: planted, so that keys and values are what they were. A range that takes it in is the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, change, gathered, held, judged, put, spread
from laconic.claims.quantize.dgq import digit_reader
from laconic.claims.search.mixdq import Painted, open_painter, painted, painting, pictures
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Packed
from laconic.core.site import Site
from laconic.core.statistic import Extremes
from laconic.core.transform import Stats
from laconic.kernels.grids import Grid
from laconic.kernels.ranges import steps_of
from laconic.methods.quantize.round.mixdq import MixDQ, OneRange, Ranged
from laconic.methods.quantize.round.rtn import RTN
from laconic.models import ModuleSource
from laconic.zoo import denoiser

HOLD = RTN(clip=True)
OURS = MixDQ(HOLD)
TAKEN_IN = replace(OURS, aware=False)
LEVEL = OneRange(Grid(8, None), 8)
# how many times the greatest feature of a word the first one has: about 800 beside 10 to 15 in the paper
LOUDER = 60


class Loud(nn.Module):
    """The norm of a caption, whose first word goes far in one direction besides."""

    def __init__(self, norm: nn.Module, far: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("far", far)

    far: Tensor

    def forward(self, words: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        normal: Tensor = self.norm(words)
        return torch.cat([normal[:, :1] + self.far, normal[:, 1:]], 1)


def planted() -> denoiser.Painter:
    """The painter with a loud first word. It goes in the direction that keys and values read least, and no more at all from then on, so
    that they are what they are without it."""
    model = denoiser.painter()
    readers = [layer for block in model.blocks for layer in (block.cross.key, block.cross.value)]  # type: ignore[union-attr]
    away = torch.linalg.svd(torch.cat([layer.weight for layer in readers]).double()).Vh[-1].float()  # type: ignore[union-attr, misc]
    for layer in readers:
        layer.weight -= torch.outer(layer.weight @ away, away)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        ids = torch.arange(len(denoiser.VOCABULARY))[:, None].expand(-1, denoiser.WORDS)
        greatest = model.caption(model.words(ids) + model.places).abs().max()
    model.caption = Loud(model.caption, LOUDER * greatest * away / away.abs().max())  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def open_planted(quick: bool) -> Bench:
    """The painter with a loud first word on the bench."""
    return painting(ModuleSource("laconic.claims.quantize.mixdq:planted", planted()), 128 if quick else 512)


@dataclass(frozen=True)
class Misplaced(MixDQ):
    """The stand-in: the range is everyone's, and nothing stands for the first token."""

    def _ranged(self, form: Packed, weight: Tensor, site: Site, stats: Stats, bits: int) -> Ranged:
        found, (low, high) = super()._ranged(form, weight, site, stats, bits), stats[Extremes()]
        if found.standing is not None:
            found.standing.zero_()
        found.scale, found.zero = steps_of(low.min().reshape(1), high.max().reshape(1), bits)
        return found


def crossing(bench: Bench, forms: dict[str, Packed]) -> float:
    """Squared error of what cross-attention gives over the square of what it gave, on the certify part."""
    answers: list[list[Tensor]] = []
    for changed in ({}, forms):
        seen: list[Tensor] = []
        model = bench.source.load(torch.float32)
        put(bench, model, changed)
        for block in model.blocks:  # type: ignore[union-attr]
            block.cross.register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))  # type: ignore[union-attr]
        with torch.inference_mode():
            for batch in bench.certify.inputs.split(bench.batch):
                model(batch)
        answers.append(seen)
    error = sum(float((a - b).double().square().sum()) for a, b in zip(*answers, strict=True))
    return error / sum(float(a.double().square().sum()) for a in answers[0])


@gathered
def _crossing(ours: MixDQ, seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """Keys and values alone are rounded."""
    bench = open_planted(lab.quick)

    def error(method: MixDQ, seed: int) -> float:
        def choose(site: Site) -> tuple[MixDQ, OneRange] | None:
            return (method, LEVEL) if site.name.endswith(("cross.key", "cross.value")) else None

        return bench.once(("crossing", method, seed), lambda: crossing(bench, change(bench, choose, seed)))  # type: ignore[no-any-return]

    found = {
        name: [error(method, seed) for seed in lab.draws(seeds)]
        for name, method in (("kept out", ours), ("taken into the range", TAKEN_IN))
    }
    a, b = found.values()
    wrong = [f"draw {i}: more than half of the error is left" for i, (x, y) in enumerate(zip(a, b, strict=True)) if x > 0.5 * y]
    yield wrong, {f"error of cross-attention, first word {name}": spread(errors, "share") for name, errors in found.items()}


def _run(bench: Bench, method: MixDQ, seed: int, classifier: nn.Module) -> Painted:
    def make() -> Painted:
        model = bench.source.load(torch.float32)
        put(bench, model, held(bench, method, LEVEL, seed))
        return painted(bench, model, classifier)

    return bench.once(("run", method, seed, classifier), make)  # type: ignore[no-any-return]


@gathered
def _whole(ours: MixDQ, seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """All matrices of the blocks and their inputs in 8 bits."""
    bench, blind = open_planted(lab.quick), nn.Linear(denoiser.PIXELS, 10)
    found = {
        name: [_run(bench, method, seed, blind) for seed in lab.draws(seeds)]
        for name, method in (("kept out", ours), ("taken into the range", TAKEN_IN))
    }
    a, b = found.values()
    wrong = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        wrong += [f"draw {i}: KL is more than half"] if x.kl > 0.5 * y.kl else []
        wrong += [f"draw {i}: the difference of images is more than half"] if x.image > 0.5 * y.image else []
    numbers = {f"KL, first word {name}": spread([one.kl for one in all_of], "nats/pixel") for name, all_of in found.items()}
    far = {
        f"squared difference of images, first word {name}": spread([one.image for one in all_of], "per pixel")
        for name, all_of in found.items()
    }
    yield wrong, numbers | far


def _lossless(ours: MixDQ, seeds: Sequence[int], lab: Lab) -> Verdict:
    """The digits of images, as an independent classifier sees them, beside those of the original."""
    if lab.data is None or not (Path(lab.data) / "mnist" / "mnist.npz").is_file():
        return Verdict("cannot be checked here", {}, "the real data of MNIST is not here; name its folder with --lab")
    classifier = digit_reader(Path(lab.data) / "mnist")
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for name, bench in (("as trained", open_painter(lab.quick)), ("with a loud first word", open_planted(lab.quick))):
        images = pictures(bench)
        right = float((classifier(images).argmax(1) == torch.arange(len(images)) % 10).float().mean())
        found = [_run(bench, ours, seed, classifier) for seed in lab.draws(seeds)]
        energy = float(images.square().mean())
        numbers[f"{name}: digits as the caption says, original"] = Measurement(right, "share", 1)
        numbers[f"{name}: digits as the caption says, W8A8"] = spread([one.right for one in found], "share")
        numbers[f"{name}: noise to signal of images"] = spread(
            [float(10 * torch.tensor(one.image / energy).log10()) for one in found], "dB"
        )
        # one image in a hundred may fall to either side
        if numbers[f"{name}: digits as the caption says, W8A8"].value < right - 0.01:
            wrong.append(f"{name}: fewer digits are right than the original's")
        if numbers[f"{name}: noise to signal of images"].value > -30:
            wrong.append(f"{name}: images differ by more than a thousandth of their energy")
    return judged(wrong, numbers)


PAPER = Paper("Zhao et al.", 2024, "arXiv:2405.17873", "sections 4.1 and 5")
PLANTED = (
    "denoiser as a generator of one step, the first word of its captions 60 times as loud as the others, weights and inputs in 8 bits, "
    "3 draws of half of 256 calibration inputs, 512 images (quick: 128)"
)
MISPLACED = Misplaced(HOLD)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Kept out of the range of keys' and values' inputs, a loud first word costs cross-attention at most half of the error that it "
        "costs when taken in.",
        where=Paper("Zhao et al.", 2024, "arXiv:2405.17873", "section 4.1"),
        scale=PLANTED + ", keys and values of the words alone",
        check=partial(_crossing, OURS, SEEDS),
        broken=partial(_crossing, MISPLACED, ONE),
    ),
    Claim(
        says="At W8A8 a loud first word kept out of the range leaves at most half the KL and half the image difference of one taken in.",
        where=PAPER,
        scale=PLANTED,
        check=partial(_whole, OURS, SEEDS),
        broken=partial(_whole, MISPLACED, ONE),
    ),
    Claim(
        says="At W8A8 images lose nothing, with a loud first word or without: within a hundredth as many digits are what the caption says, "
        "and the difference has at most a thousandth of their energy.",
        where=PAPER,
        scale=PLANTED + ", and the denoiser as it was trained",
        check=partial(_lossless, OURS, SEEDS),
        broken=partial(_lossless, MISPLACED, ONE),
    ),
)
