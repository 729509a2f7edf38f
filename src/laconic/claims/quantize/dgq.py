"""Claims of DGQ, on a denoiser: states of its own sampling calibrate it, and images that it makes from the same noise are compared.

The KL of a denoiser's answers is half the squared difference of their noise. Other ranges and other maps are the baselines at the same
bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.artifact import stand
from laconic.claims.lab import ONE, SEEDS, Bench, Duel, gathered, held, judged, measured, put, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Packed
from laconic.core.part import Rounding
from laconic.core.site import Linear, Site
from laconic.core.statistic import Extremes, Sample
from laconic.core.transform import Change, Stats, Transform
from laconic.data import Samples
from laconic.kernels.grids import Grid
from laconic.kernels.ranges import apart, evenly, powers, steps_of
from laconic.measurement import outputs
from laconic.methods.quantize.round.dgq import DGQ, GroupedInputs, Powers, Spanned, spanned
from laconic.methods.quantize.round.rtn import RTN
from laconic.models import open_model
from laconic.zoo import denoiser

WEIGHTS = Grid(4, None)
HOLD = RTN(clip=True)
OURS = DGQ(hold=HOLD)
# bits of inputs and of maps
BITS = (8, 6, 4)
GROUPS = 8


def at(bits: int) -> GroupedInputs:
    """Weights in 4 bits, a scale a row, before inputs of so many."""
    return GroupedInputs(WEIGHTS, bits, GROUPS)


# ---- a denoiser on the bench


class Shown(NamedTuple):
    """A changed denoiser: KL in nats a pixel, mean squared difference a pixel of the images made from the same noise, their digits as the
    captions say in a classifier's eyes (a share; NaN without one), bytes of what is held."""

    kl: float
    image: float
    right: float
    bytes: int


@lru_cache(maxsize=2)
def open_denoiser(quick: bool) -> Bench:
    """The denoiser, 16 chains of 16 steps (in full 24) of each part; a seed draws half of the calibration states."""
    chains, steps = (16, 16) if quick else (24, 16)
    source = open_model("laconic.zoo.denoiser:denoiser")
    model = source.load(torch.float32)
    pool, seen = ([torch.cat(part) for part in zip(*denoiser.states(seed, chains, steps, model), strict=True)] for seed in (1, 2))
    inputs, noise = seen
    run = outputs(model)
    with torch.inference_mode():
        logits = tuple(run(batch) for batch in inputs.split(128))
    return Bench("denoiser", source, pool[0], Samples(inputs, noise, 1, len(inputs), ""), 128, len(pool[0]) // 2, logits)


def images(bench: Bench, model: nn.Module, seed: int, quick: bool) -> Tensor:
    """What a model makes of the noise and the captions of a seed, (20 or 40, pixels), in 16 steps."""
    *_, (last, _) = denoiser.sampled(model, *denoiser.drawn(100 + seed, 20 if quick else 40), 16)
    return last[:, : denoiser.PIXELS]


def shown(bench: Bench, model: nn.Module, held: int, seed: int, quick: bool, classifier: nn.Module | None = None) -> Shown:
    """A model of so many bytes on the certify part, and its images beside those of the original."""
    wanted = bench.once(("images", seed, quick), lambda: images(bench, bench.source.load(torch.float32), seed, quick))
    made = images(bench, model, seed, quick)
    right = torch.nan if classifier is None else float((classifier(made).argmax(1) == torch.arange(len(made)) % 10).float().mean())
    return Shown(measured(bench, model, held).kl, float((made - wanted).square().mean()), right, held)


def better(label: str, ours: Sequence[Shown], theirs: Sequence[Shown], names: tuple[str, str]) -> Duel:
    """What is wrong with "ours has a lower KL and makes images nearer to the original's than theirs, in every draw", and the numbers."""
    numbers: dict[str, Measurement] = {}
    for name, found in zip(names, (ours, theirs), strict=True):
        numbers[f"{label}: KL, {name}"] = spread([one.kl for one in found], "nats/pixel")
        numbers[f"{label}: squared difference of images, {name}"] = spread([one.image for one in found], "per pixel")
        numbers[f"{label}: bytes, {name}"] = spread([float(one.bytes) for one in found], "bytes")
    wrong = []
    if any(a.kl >= b.kl for a, b in zip(ours, theirs, strict=True)):
        wrong.append(f"{label}: KL of {names[0]} is not below that of {names[1]}")
    if any(a.image >= b.image for a, b in zip(ours, theirs, strict=True)):
        wrong.append(f"{label}: images of {names[0]} are not nearer than those of {names[1]}")
    return wrong, numbers


# ---- other ranges


@dataclass(frozen=True)
class Ranged(Transform):
    """The baselines: other groups of inputs, or all in one, from the least to the greatest, or (clip) from the share of both ends, of 20
    down from 1, with which some rows of inputs err least. hold: as of DGQ."""

    hold: Transform = HOLD
    groups: Literal["one", "random", "misplaced"] = "one"
    clip: bool = False

    acts_on = (Linear,)
    level = GroupedInputs
    wants = (Extremes(), Sample())

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: GroupedInputs) -> Change:
        change = self.hold(site, weights, stats, level.weight)
        return Change(hold={tensor: self._of(form, stats, level) for tensor, form in change.hold.items()})

    def _of(self, form: Packed, stats: Stats, level: GroupedInputs) -> Spanned:
        ends, inputs = (stats[kind] for kind in self.wants)
        if self.groups == "random":
            return spanned(form, ends, level, lambda points, count: torch.arange(len(points))[_mixed(len(points))] % count)
        if self.groups == "misplaced":
            # the ranges of the groups that k-means finds, each of them another's
            found = spanned(form, ends, level)
            return Spanned(form, level.inputs, found.axis, found.length, found.index, found.scale.roll(1), found.zero.roll(1))
        found = spanned(form, ends, replace(level, groups=1))
        if not self.clip:
            return found
        low, high = ends[0].min(), ends[1].max()

        def error(one: tuple[Tensor, Tensor]) -> float:
            return float((evenly(inputs, one[0], one[1], level.inputs) - inputs).double().square().sum())

        tried = [steps_of((low * share)[None], (high * share)[None], level.inputs) for share in torch.linspace(1, 0.05, 20).tolist()]
        scale, zero = min(tried, key=error)
        return Spanned(form, level.inputs, found.axis, found.length, found.index, scale, zero)

    def stored(self, site: Site, level: GroupedInputs) -> int:
        return replace(OURS, hold=self.hold).stored(site, level if self.groups != "one" else replace(level, groups=1))


def _mixed(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


# ---- other maps


class Mapped(Rounding):
    """A softmax whose shares, all but the first key's or (whole) all, are rounded: in even steps from 0 to the greatest that was seen, or
    in powers of a half of that, or of an eighth of the greatest as it comes, which is the stand-in."""

    part = ""

    def __init__(self, how: Literal["even", "powers", "astray"], bits: int, greatest: Tensor, whole: bool = False) -> None:
        super().__init__()
        self.how, self.bits, self.greatest, self.whole = how, bits, greatest, whole

    def forward(self, scores: Tensor) -> Tensor:
        shares = scores.softmax(-1)
        if self.how == "powers":
            return powers(shares, self.greatest, self.bits) if self.whole else apart(shares, self.bits, self.greatest)
        if self.how == "astray":
            return apart(shares, self.bits, shares[..., 1:].amax((1, 2, 3), keepdim=True) / 8)
        scale, zero = steps_of(torch.zeros(()), self.greatest, self.bits)
        even = evenly(shares, scale, zero, self.bits)
        return even if self.whole else torch.cat([shares[..., :1], even[..., 1:]], -1)

    def describe(self) -> dict[str, Any]:
        raise TypeError("stands in a claim alone")

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Mapped:
        raise TypeError("stands in a claim alone")


def crossed(bench: Bench) -> list[str]:
    """Paths of the softmaxes over the words."""
    maps = [found for site in bench.source.anatomy.sites() if (found := site.context.get("map")) is not None]
    return [found.path for found in maps if found.crossed]


def greatest(bench: Bench, seed: int, whole: bool) -> dict[str, Tensor]:
    """Of each map over the words the greatest share that calibration shows, the first key's left out unless the whole is meant."""

    def make() -> dict[str, Tensor]:
        model, found = bench.source.load(torch.float32), dict.fromkeys(crossed(bench), torch.zeros(()))

        def seen(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, shares: Tensor) -> None:
                found[path] = torch.maximum(found[path], shares[..., 0 if whole else 1 :].max())

            return hook

        for path in found:
            model.get_submodule(path).register_forward_hook(seen(path))
        with torch.no_grad():
            for batch in bench.drawn(seed).split(bench.batch):
                model(batch)
        return found

    kept: dict[str, Tensor] = bench.once(("greatest", seed, whole), make)
    return kept


Maps = Literal["run-time powers", "static powers", "even", "even, whole", "astray", "as they are"]


def mapped(bench: Bench, model: nn.Module, how: Maps, bits: int, seed: int) -> None:
    """Puts other maps over the words into a model."""
    if how == "as they are":
        return
    most = greatest(bench, seed, how == "even, whole")
    for path in crossed(bench):
        parts: dict[Maps, Callable[[], Rounding]] = {
            "run-time powers": lambda: Powers(bits),
            "static powers": partial(Mapped, "powers", bits, most[path]),
            "even": partial(Mapped, "even", bits, most[path]),
            "even, whole": partial(Mapped, "even", bits, most[path], True),
            "astray": partial(Mapped, "astray", bits, most[path]),
        }
        stand(model, path, parts[how]())


def run(
    bench: Bench, method: Transform | None, bits: int, maps: Maps, seed: int, quick: bool, classifier: nn.Module | None = None
) -> Shown:
    """A denoiser whose blocks' matrices and inputs a method rounds, and whose maps are rounded so; measured once."""

    def make() -> Shown:
        model, forms = bench.source.load(torch.float32), {} if method is None else held(bench, method, at(bits), seed)
        put(bench, model, forms)
        mapped(bench, model, maps, bits, seed)
        return shown(bench, model, sum(form.nbytes for form in forms.values()), seed, quick, classifier)

    found: Shown = bench.once(("run", method, bits, maps, seed, quick, classifier is None), make)
    return found


# ---- the claims

RIVALS: tuple[tuple[str, Transform], ...] = (
    ("one range, least to greatest", Ranged()),
    ("one range of least squared error", Ranged(clip=True)),
)


@gathered
def _whole(ours: Transform, maps: Maps, widths: Sequence[int], seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """DGQ's groups and maps against one range for a tensor and maps in even steps."""
    bench = open_denoiser(lab.quick)
    for bits in widths:
        mine = [run(bench, ours, bits, maps, seed, lab.quick) for seed in lab.draws(seeds)]
        for name, rival in RIVALS:
            theirs = [run(bench, rival, bits, "even, whole", seed, lab.quick) for seed in lab.draws(seeds)]
            yield better(f"W4A{bits}", mine, theirs, ("groups and powers of a half", name))


@gathered
def _maps(maps: Maps, rival: Maps, seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """Maps alone, all else as it is."""
    bench = open_denoiser(lab.quick)
    for bits in BITS:
        mine, theirs = ([run(bench, None, bits, how, seed, lab.quick) for seed in lab.draws(seeds)] for how in (maps, rival))
        yield better(f"maps in {bits} bits", mine, theirs, ("powers of a half, as they come", rival))
    if rival == "even":
        for bits in BITS:
            whole = [run(bench, None, bits, "even, whole", seed, lab.quick).kl for seed in lab.draws(seeds)]
            yield [], {f"maps in {bits} bits: KL, even with the first word": spread(whole, "nats/pixel")}


@gathered
def _groups(ours: Transform, rivals: Sequence[tuple[str, Transform]], seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """Groups of inputs alone, maps as they are."""
    bench = open_denoiser(lab.quick)
    for bits in BITS:
        mine = [run(bench, ours, bits, "as they are", seed, lab.quick) for seed in lab.draws(seeds)]
        for name, rival in rivals:
            theirs = [run(bench, rival, bits, "as they are", seed, lab.quick) for seed in lab.draws(seeds)]
            yield better(f"W4A{bits}", mine, theirs, ("groups by k-means", name))


@lru_cache(maxsize=1)
def digit_reader(folder: Path) -> nn.Module:
    """Tells digits of the denoiser's size, learned on MNIST for 600 steps."""
    train, _ = denoiser.digits(folder)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(denoiser.PIXELS, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(600):
        index = torch.randint(len(train.pixels), (128,), generator=generator)
        loss = F.cross_entropy(model(denoiser.normal(train.pixels[index])), train.said.digit[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


def _digits(ours: Transform, maps: Maps, seeds: Sequence[int], lab: Lab) -> Verdict:
    """The digits of images, as an independent classifier sees them."""
    if lab.data is None or not (Path(lab.data) / "mnist" / "mnist.npz").is_file():
        return Verdict("cannot be checked here", {}, "the real data of MNIST is not here; name its folder with --lab")
    classifier, bench = digit_reader(Path(lab.data) / "mnist"), open_denoiser(lab.quick)
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}

    def rights(label: str, method: Transform | None, bits: int, maps: Maps) -> float:
        found = [run(bench, method, bits, maps, seed, lab.quick, classifier).right for seed in lab.draws(seeds)]
        numbers[label] = spread(found, "share")
        return numbers[label].value

    rights("digits as the caption says, original", None, 8, "as they are")
    for bits in BITS[1:]:
        mine = rights(f"W4A{bits}: digits as the caption says, groups and powers of a half", ours, bits, maps)
        for name, rival in RIVALS:
            if mine <= rights(f"W4A{bits}: digits as the caption says, {name}", rival, bits, "even, whole"):
                wrong.append(f"W4A{bits}: no more digits are right than with {name}")
    return judged(wrong, numbers)


PAPER = Paper("Ryu et al.", 2025, "arXiv:2501.04304", "section 5, tables 1 to 3")
SCALE = "denoiser, matrices of the blocks in 4 bits, a scale a row, and their inputs in 8, 6 and 4, in 8 groups"
DRAWS = ", 16 steps of 24 chains, 3 draws of half the calibration states and of 40 images (quick: 16 chains, 20 images)"
MISPLACED = Ranged(groups="misplaced")

LOT = (("groups by lot", Ranged(groups="random")),)
MAPS = "denoiser, its attention over words alone is rounded, to 8, 6 and 4 bits" + DRAWS

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Below 8 bits, at W4A6 and W4A4, groups of inputs and maps in powers of a half have a lower KL than one range a tensor, from "
        "the least to the greatest or of least squared error, with maps in even steps, and nearer images from the same noise.",
        where=PAPER,
        scale=SCALE + DRAWS,
        check=partial(_whole, OURS, "run-time powers", BITS[1:], SEEDS),
        broken=partial(_whole, MISPLACED, "run-time powers", BITS[1:], ONE),
    ),
    Claim(
        says="At W4A8 too, groups of inputs and maps in powers of a half have a lower KL than one range a tensor with maps in even steps, "
        "and nearer images from the same noise.",
        where=PAPER,
        scale=SCALE + DRAWS,
        check=partial(_whole, OURS, "run-time powers", BITS[:1], SEEDS),
        broken=partial(_whole, MISPLACED, "run-time powers", BITS[:1], ONE),
    ),
    Claim(
        says="Groups of inputs alone have a lower KL than one range a tensor, from the least to the greatest or of least squared error, "
        "and nearer images from the same noise, at W4A8, W4A6 and W4A4.",
        where=Paper("Ryu et al.", 2025, "arXiv:2501.04304", "section 4.1"),
        scale=SCALE + ", maps as they are" + DRAWS,
        check=partial(_groups, OURS, RIVALS, SEEDS),
        broken=partial(_groups, MISPLACED, RIVALS, ONE),
    ),
    Claim(
        says="Groups that k-means finds have a lower KL than as many groups by lot, and nearer images, at W4A8, W4A6 and W4A4.",
        where=Paper("Ryu et al.", 2025, "arXiv:2501.04304", "section 4.1"),
        scale=SCALE + ", maps as they are" + DRAWS,
        check=partial(_groups, OURS, LOT, SEEDS),
        broken=partial(_groups, MISPLACED, LOT, ONE),
    ),
    Claim(
        says="Maps over the words in powers of a half have a lower KL and nearer images when counted from their greatest share as it comes "
        "than from the greatest of calibration, the first word apart in both.",
        where=Paper("Ryu et al.", 2025, "arXiv:2501.04304", "section 4.2"),
        scale=MAPS,
        check=partial(_maps, "run-time powers", "static powers", SEEDS),
        broken=partial(_maps, "astray", "static powers", ONE),
    ),
    Claim(
        says="Maps over the words in powers of a half of their greatest share as it comes have a lower KL and nearer images than in even "
        "steps up to the greatest of calibration, the first word apart in both.",
        where=Paper("Ryu et al.", 2025, "arXiv:2501.04304", "section 4.2"),
        scale=MAPS,
        check=partial(_maps, "run-time powers", "even", SEEDS),
        broken=partial(_maps, "astray", "even", ONE),
    ),
    Claim(
        says="At W4A6 and W4A4 an independent classifier finds more digits that are what the caption says than with one range a tensor.",
        where=PAPER,
        scale=SCALE + ", a classifier learned on MNIST" + DRAWS,
        check=partial(_digits, OURS, "run-time powers", SEEDS),
        broken=partial(_digits, MISPLACED, "run-time powers", ONE),
    ),
)

__all__ = ["BITS", "CLAIMS", "Ranged", "Shown", "at", "better", "digit_reader", "open_denoiser", "shown"]
