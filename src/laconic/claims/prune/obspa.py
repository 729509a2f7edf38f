"""Claims of OBSPA: against group L1 removal of the same shapes, alone or with norms moved by the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Smaller, cut, judged, on, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.site import Group, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Cut, Stats
from laconic.methods.prune.cut.obspa import Obspa
from laconic.methods.prune.cut.spa import Spa
from laconic.methods.prune.score.magnitude import Magnitude

Inputs = Literal["data", "noise"]


class Side(NamedTuple):
    """One side of a comparison: a method, and whether norms move with it."""

    name: str
    method: Cut
    norms: bool = True


@dataclass(frozen=True)
class Backwards(Cut):
    """The stand-in: OBSPA's correction with the wrong sign."""

    wants = (Gram(),)

    def sites(self, group: Group) -> tuple[Site, ...]:
        return Obspa().sites(group)

    def worth(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Tensor:
        return Obspa().worth(group, weights, stats)

    def __call__(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], kept: tuple[int, ...]) -> Change:
        plain = Spa(Magnitude())(group, weights, stats, kept).fold
        moved = Obspa()(group, weights, stats, kept).fold
        return Change(cut=((group, kept),), fold={name: 2 * plain[name] - moved[name] for name in moved})


def numbers_of(label: str, found: Sequence[Smaller], classifier: bool) -> dict[str, Measurement]:
    """What is said of a cut model over its draws."""
    last = "right classes" if classifier else "loss"
    return {
        f"{label}: KL": spread([one.found.kl for one in found], "nats" if classifier else "nats/token"),
        f"{label}: same first choice as the original": spread([one.found.agreement for one in found], ""),
        f"{label}: {last}": spread([one.found.loss for one in found], "" if classifier else "nats/token"),
        f"{label}: bytes": spread([float(one.found.bytes) for one in found], "bytes"),
        f"{label}: multiplications as a share of the original's": spread([one.multiplications / one.original for one in found], ""),
    }


def beats(bench: Bench, ours: Side, theirs: Side, keep: float, inputs: Inputs, seeds: Sequence[int]) -> Verdict:
    """Ours has a lower KL and agrees more often with the original than theirs, in every draw."""
    classifier = bench.source.task != "text"
    mine = [cut(bench, ours.method, keep, seed, inputs, ours.norms) for seed in seeds]
    numbers = numbers_of(ours.name, mine, classifier)
    # without norms to move, a method that looks at nothing has no chance in it
    drawn = seeds if classifier and theirs.norms else ONE
    rival = [cut(bench, theirs.method, keep, seed, inputs, theirs.norms) for seed in drawn]
    numbers |= numbers_of(theirs.name, rival, classifier)
    wrong = []
    pairs = list(zip(mine, rival if len(rival) == len(mine) else rival * len(mine), strict=True))
    if any(a.found.bytes != b.found.bytes for a, b in pairs):
        wrong.append(f"{theirs.name} does not cut the same shapes")
    if any(a.found.kl >= b.found.kl for a, b in pairs):
        wrong.append(f"KL is not below that of {theirs.name}")
    if any(a.found.agreement <= b.found.agreement for a, b in pairs):
        wrong.append(f"{theirs.name} agrees as often with the original")
    return judged(wrong, numbers)


def _data_helps(bench: Bench, ours: Cut, keep: float, seeds: Sequence[int]) -> Verdict:
    classifier = bench.source.task != "text"
    real, noise = ([cut(bench, ours, keep, seed, inputs) for seed in seeds] for inputs in ("data", "noise"))
    numbers = numbers_of("data", real, classifier) | numbers_of("noise", noise, classifier)
    wrong = ["noise has a lower KL than data"] if any(a.found.kl > b.found.kl for a, b in zip(real, noise, strict=True)) else []
    # the noise that is meant helps, too: it beats removal that makes up for nothing
    plain = [cut(bench, Spa(Magnitude()), keep, seed, "noise") for seed in seeds]
    numbers |= numbers_of("group L1, noise", plain, classifier)
    if any(a.found.kl >= b.found.kl for a, b in zip(real, plain, strict=True)):
        wrong.append("data does not help against removal alone")
    return judged(wrong, numbers)


def _on(name: str, theirs: Side, keep: float, inputs: Inputs, ours: Side, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: beats(bench, ours, theirs, keep, inputs, lab.draws(seeds)))


PAPER = Paper("Wang, Rachwan, Günnemann and Charpentier", 2024, "arXiv:2403.18955", "section 4, train-prune without fine-tuning")
OURS, WRONG = Side("OBSPA", Obspa()), Side("OBSPA backwards", Backwards())
ALONE, MOVED = Side("group L1 removal", Spa(Magnitude()), norms=False), Side("group L1 with moved norms", Spa(Magnitude()))
# against removal alone, moving norms is a part of the method, which the stand-in lacks too
WORSE = WRONG._replace(norms=False)
CNN, LM = 0.55, 0.8

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Without data and without training, OBSPA on noise loses less KL, and the class changes less often, than group L1 removal.",
        where=PAPER,
        scale="ResNet-20 on CIFAR-10, 55 % of the bytes, the same shapes, 3 draws of noise",
        check=partial(_on, "resnet20", ALONE, CNN, "noise", OURS, SEEDS),
        broken=partial(_on, "resnet20", ALONE, CNN, "noise", WORSE, ONE),
    ),
    Claim(
        says="Without data, what OBSPA does to the weights helps beyond moving the norms by the same noise after group L1 removal.",
        where=PAPER,
        scale="ResNet-20 on CIFAR-10, 55 % of the bytes, the same shapes, 3 draws of noise",
        check=partial(_on, "resnet20", MOVED, CNN, "noise", OURS, SEEDS),
        broken=partial(_on, "resnet20", MOVED, CNN, "noise", WRONG, ONE),
    ),
    Claim(
        says="With calibration data and without training, OBSPA loses less KL, and the class changes less often, than group L1 removal.",
        where=PAPER,
        scale="ResNet-20 on CIFAR-10, 55 % of the bytes, the same shapes and norms moved by the same images, 3 draws of images",
        check=partial(_on, "resnet20", MOVED, CNN, "data", OURS, SEEDS),
        broken=partial(_on, "resnet20", MOVED, CNN, "data", WRONG, ONE),
    ),
    Claim(
        says="Calibration data serve OBSPA at least as well as noise.",
        where=PAPER,
        scale="ResNet-20 on CIFAR-10, 55 % of the bytes, 3 draws",
        check=lambda lab: on(lab, "resnet20", lambda bench: _data_helps(bench, Obspa(), CNN, lab.draws(SEEDS))),
        broken=lambda lab: on(lab, "resnet20", lambda bench: _data_helps(bench, Backwards(), CNN, ONE)),
    ),
    Claim(
        says="On a language model, OBSPA loses less KL, and the first choice changes less often, than group L1 removal.",
        where=PAPER,
        scale="nano, 80 % of the bytes, feed-forward channels and KV heads with the query heads they serve, 3 draws of rows",
        check=partial(_on, "nano", MOVED, LM, "data", OURS, SEEDS),
        broken=partial(_on, "nano", MOVED, LM, "data", WRONG, ONE),
    ),
    Claim(
        says="On a language model without data, OBSPA on noise loses less KL, and the first choice changes less often, than group L1.",
        where=PAPER,
        scale="nano, 80 % of the bytes, tokens drawn evenly, 3 draws",
        check=partial(_on, "nano", MOVED, LM, "noise", OURS, SEEDS),
        broken=partial(_on, "nano", MOVED, LM, "noise", WRONG, ONE),
    ),
)
