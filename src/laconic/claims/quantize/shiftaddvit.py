"""Claims of ShiftAddViT, on a small vision transformer of digits: additions, shifts and a mixture against the float model and against
shifts alone, tuned alike, on the same images in the same order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, gathered, measured, spread
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.router import Load, Routed, Settling, asking
from laconic.core.site import Anatomy, Site
from laconic.core.transform import Change
from laconic.data import Samples
from laconic.measurement import load_of, outputs, routed
from laconic.methods.quantize.mix.shiftaddvit import Attention, Mixture, ShiftAddViT
from laconic.models import open_model
from laconic.pipeline import learn_routed
from laconic.zoo import small, vit

# pJ of a product and of a sum of fp32 and of int32, and of a shift of int32, in 45 nm (Horowitz 2014, 10.1109/ISSCC.2014.6757323, figure
# 1.1.9; shifts: You et al. 2020, arXiv:2010.12785, table 1)
PRODUCT, SUM, SHIFT, WHOLE = 3.7, 0.9, 0.13, 0.1


# classes in the place of the mixture and of the attention
Kinds = tuple[type[Mixture], "type[Attention] | None"]


class Done(NamedTuple):
    """A model that has learned, on the certify images."""

    model: nn.Module
    found: Found
    load: Load

    @property
    def share(self) -> float:
        """Of the original's multiplications with weights, on average."""
        return self.load.expected / self.load.dense


# ---- what takes the place of parts


class Alone(Mixture):
    """No mixture: the copy in shifts for all tokens."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.weight = 0.0

    def chosen(self, logits: Tensor) -> Tensor:
        return torch.zeros(len(logits), dtype=torch.bool)


class Crossed(Mixture):
    """Latencies the wrong way round."""

    @property
    def _latencies(self) -> Tensor:
        return super()._latencies.flip(0)


class Plain(Mixture):
    """The layer as it was."""

    def chosen(self, logits: Tensor) -> Tensor:
        return torch.ones(len(logits), dtype=torch.bool)


class Blind(Attention):
    """Every token sees itself alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.normalize(v, dim=-1)


@dataclass(frozen=True)
class With(ShiftAddViT):
    """The method with parts of other classes. mixture: in place of the mixture; attention: in place of the attention, or none."""

    mixture: type[Mixture] = Mixture
    attention: type[Attention] | None = Attention

    def place(self, site: Site, anatomy: Anatomy) -> Change:
        placed = super().place(site, anatomy).place
        kinds = {Attention: self.attention, Mixture: self.mixture}
        return Change(
            place={
                path: kind.restore(part.describe())
                for path, part in placed.items()
                if isinstance(part, Routed) and (kind := kinds[type(part)]) is not None  # type: ignore[index]
            }
        )


# ---- learned


def open_digits(lab: Lab) -> Bench | None:
    """The vision transformer on MNIST; none where that is not there. Quick: 1,024 training images in place of 8,192, 512 others in place of
    2,000."""
    folder = None if lab.data is None else lab.data / "mnist"
    if folder is None or not (folder / "mnist.npz").is_file():
        return None
    return _opened(folder, lab.quick)


@lru_cache(maxsize=2)
def _opened(folder: Path, quick: bool) -> Bench:
    train, test = small.mnist(folder)
    many, count = (1024, 512) if quick else (8192, 2000)
    index = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[:many]
    model = vit.vit()
    source = open_model(model)
    source.trace(model.example_input)
    inputs, run = vit.normal(test[0][:count]), outputs(model)
    with torch.inference_mode():
        logits = tuple(run(x) for x in inputs.split(250))
    return Bench("vit", source, vit.normal(train[0][index]), Samples(inputs, test[1][:count], 1, count, ""), 250, 0, logits)


def _ours(lab: Lab, steps: int, kinds: Kinds) -> With:
    mixture, attention = kinds
    return (
        With(steps=24, batch=32, mixture=mixture, attention=attention)
        if lab.quick
        else With(steps=steps, mixture=mixture, attention=attention)
    )


def _learned(lab: Lab, bench: Bench, router: With, seed: int) -> Done:
    """Learned in the order of a seed, settled as it is stored; once for each."""

    def make() -> Done:
        with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
            model, parts, said = learn_routed(bench.source, bench.source, bench.pool, router, seed=seed, folder=Path(scratch))
        lab.log(f"{router}, seed {seed}: {said}")
        for part in parts.values():
            if isinstance(part, Settling):
                part.settle()
        with asking(routed(model), "masked", "router"):
            load, _ = load_of(model, bench.certify.inputs.split(bench.batch), "classify")
        return Done(model, measured(bench, model, 0), load)

    done: Done = bench.once(("shiftadd", router, seed), make)
    return done


def _shares(done: Done) -> list[float]:
    """Of tokens, by layer, what the multiplying expert gets."""
    found = []
    for part in routed(done.model):
        if isinstance(part, Mixture):
            load = part.load
            found.append((load.expected - (load.worst - load.dense)) / load.dense)
    return found


# ---- checks


def _said(label: str, found: Sequence[Done]) -> Duel:
    return [], {
        f"{label}: right classes": spread([one.found.loss for one in found], ""),
        f"{label}: KL": spread([one.found.kl for one in found], "nats"),
        f"{label}: multiplications as a share of the original's": spread([one.share for one in found], ""),
    }


@gathered
def _accurate(lab: Lab, bench: Bench, router: With, seeds: Sequence[int]) -> Iterator[Duel]:
    ours = [_learned(lab, bench, router, seed) for seed in seeds]
    yield [], {"right classes of the original": spread([ours[0].found.original], "")}
    yield _said("mixture", ours)
    wrong = []
    if any(one.found.loss < one.found.original - 0.02 for one in ours):
        wrong.append("more than two points of right classes are lost")
    theirs = [_learned(lab, bench, replace(router, mixture=Alone, attention=Attention), seed) for seed in seeds]
    yield _said("shifts alone", theirs)
    if any(a.found.loss <= b.found.loss for a, b in zip(ours, theirs, strict=True)):
        wrong.append("no more classes are right than with shifts alone")
    yield wrong, {}


def _energies(bench: Bench, done: Done) -> tuple[float, float]:
    """Of one image, in nJ, of the original and of what was learned: products with weights, and attention's own."""
    tokens = (vit.SIZE // vit.PATCH) ** 2 + 1
    pairs = 2 * vit.LAYERS * tokens * tokens * vit.HIDDEN
    sums = 2 * vit.LAYERS * tokens * vit.HIDDEN * (vit.HIDDEN // vit.HEADS)
    before = (done.load.dense + pairs) * (PRODUCT + SUM)
    after = done.load.expected * (PRODUCT + SUM) + (done.load.dense - done.load.expected) * (SHIFT + WHOLE) + sums * SUM
    return before / 1e3, after / 1e3


@gathered
def _cheap(lab: Lab, bench: Bench, router: With, seeds: Sequence[int]) -> Iterator[Duel]:
    done = [_learned(lab, bench, router, seed) for seed in seeds]
    energies = [_energies(bench, one) for one in done]
    wrong = []
    if any(one.share > 0.4 for one in done):
        wrong.append("multiplications fall by less than 60 %")
    if any(after > 0.4 * before for before, after in energies):
        wrong.append("the energy falls by less than 60 %")
    yield (
        wrong,
        {
            "multiplications as a share of the original's": spread([one.share for one in done], ""),
            "at most, whatever the image": spread([one.load.worst / one.load.dense for one in done], ""),
            "energy of the original": spread([before for before, _ in energies], "nJ/image"),
            "energy": spread([after for _, after in energies], "nJ/image"),
        },
    )


@gathered
def _balanced(lab: Lab, bench: Bench, router: With, seeds: Sequence[int]) -> Iterator[Duel]:
    wrong = []
    for latency in (router.latency, 0.8):
        found = [_shares(_learned(lab, bench, replace(router, latency=latency), seed)) for seed in seeds]
        means = [sum(shares) / len(shares) for shares in found]
        farthest = [shares[max(range(len(shares)), key=lambda i: abs(shares[i] - mean))] for shares, mean in zip(found, means, strict=True)]
        if any(abs(mean - (1 - latency)) > 0.1 for mean in means):
            wrong.append(f"latency {latency:g}: tokens do not go where they are computed sooner")
        numbers = {
            f"latency {latency:g}: tokens of the multiplying expert": spread(means, ""),
            f"latency {latency:g}: of the layer that is farthest from the mean": spread(farthest, ""),
        }
        yield [], numbers
    yield wrong, {}


@gathered
def _needed(lab: Lab, bench: Bench, router: With, seeds: Sequence[int]) -> Iterator[Duel]:
    """router: whose attention is as it was."""
    ours = [_learned(lab, bench, router, seed) for seed in seeds]
    theirs = [_learned(lab, bench, replace(router, mixture=Alone, attention=None), seed) for seed in seeds]
    yield _said("attention as it was, mixture", ours)
    yield _said("attention as it was, shifts alone", theirs)
    yield (["shifts alone lose no more"] if any(a.found.kl >= b.found.kl for a, b in zip(ours, theirs, strict=True)) else []), {}


Check = Callable[[Lab, Bench, With, Sequence[int]], Verdict]


def _on(check: Check, kinds: Kinds, steps: int, broken: bool, lab: Lab) -> Verdict:
    bench = open_digits(lab)
    if bench is None:
        return Verdict("cannot be checked here", {}, "MNIST is not here; name its folder with --lab")
    return check(lab, bench, _ours(lab, steps, kinds), ONE if broken else lab.draws(SEEDS))


PAPER = Paper("You et al.", 2023, "arXiv:2306.06446", "section 5")
SCALE = (
    "a vision transformer of 0.1 M parameters on MNIST, 8,192 training images in {} steps of 64, KL to the original in place of the loss "
    "of the classes, 2,000 test images, 3 orders"
)
BOTH: Kinds = (Mixture, Attention)
LONG, SHORT = 1000, 500

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Additions, shifts and a mixture lose at most two points of right classes, and fewer than shifts without the mixture.",
        where=PAPER,
        scale=SCALE.format("1,000"),
        check=partial(_on, _accurate, BOTH, LONG, False),
        broken=partial(_on, _accurate, (Mixture, Blind), LONG, True),
    ),
    Claim(
        says="Multiplications with weights, and the energy of an image in 45 nm, fall by 60 % or more.",
        where=PAPER,
        scale=SCALE.format("1,000"),
        check=partial(_on, _cheap, BOTH, LONG, False),
        broken=partial(_on, _cheap, (Plain, Attention), LONG, True),
    ),
    Claim(
        says="Tokens go to the experts in inverse proportion to the latencies that the balance is given, to a tenth of the tokens.",
        where=PAPER,
        scale=SCALE.format("500"),
        check=partial(_on, _balanced, BOTH, SHORT, False),
        broken=partial(_on, _balanced, (Crossed, Attention), SHORT, True),
    ),
    Claim(
        says="With attention as it was, the mixture has a lower KL than shifts alone.",
        where=PAPER,
        scale=SCALE.format("500"),
        check=partial(_on, _needed, (Mixture, None), SHORT, False),
        broken=partial(_on, _needed, (Crossed, Blind), SHORT, True),
    ),
)
