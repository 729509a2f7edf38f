"""Claims of SPA: what a group's slices are worth together, against what the matrix that writes its channels says alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, cut, judged, on
from laconic.claims.prune.obspa import numbers_of
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Group, Site
from laconic.core.transform import Change, Cut, Stats
from laconic.methods.prune.cut.spa import Spa, coupled_importance, matrices
from laconic.methods.prune.score.magnitude import Magnitude


@dataclass(frozen=True)
class Filters(Cut):
    """The baseline: a channel is worth the L1 norm of the filters that write it (Li et al. 2017), what reads it is not asked."""

    def sites(self, group: Group) -> tuple[Site, ...]:
        return ()

    def worth(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Tensor:
        writers = [(m, weights[m.site.name].abs()) for m in matrices(group) if not m.reads]
        return coupled_importance(group.width, writers)

    def __call__(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], kept: tuple[int, ...]) -> Change:
        return Spa(Magnitude())(group, weights, stats, kept)


@dataclass(frozen=True)
class Upside(Cut):
    """The stand-in: the most important channels go."""

    def sites(self, group: Group) -> tuple[Site, ...]:
        return ()

    def worth(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Tensor:
        return -Spa(Magnitude()).worth(group, weights, stats)

    def __call__(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], kept: tuple[int, ...]) -> Change:
        return Spa(Magnitude())(group, weights, stats, kept)


@dataclass(frozen=True)
class Torn(Cut):
    """A stand-in: what reads the channels that stay gets the wrong sign. Where large weights say little of what matters, as in nano, the
    most important ones may go without harm."""

    def sites(self, group: Group) -> tuple[Site, ...]:
        return ()

    def worth(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Tensor:
        return Spa(Magnitude()).worth(group, weights, stats)

    def __call__(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], kept: tuple[int, ...]) -> Change:
        return Change(
            cut=((group, kept),), fold={name: -value for name, value in Spa(Magnitude())(group, weights, stats, kept).fold.items()}
        )


def _below(bench: Bench, ours: Cut, keep: float, seeds: Sequence[int]) -> Verdict:
    classifier = bench.source.task != "text"
    draws = seeds if classifier else ONE
    mine, rival = ([cut(bench, method, keep, seed, "data") for seed in draws] for method in (ours, Filters()))
    numbers = numbers_of("all slices", mine, classifier) | numbers_of("filters alone", rival, classifier)
    worse = any(a.found.kl >= b.found.kl for a, b in zip(mine, rival, strict=True))
    return judged(["KL is not below that of filters alone"] if worse else [], numbers)


def _on(name: str, keep: float, ours: Cut, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _below(bench, ours, keep, lab.draws(seeds)))


PAPER = Paper("Wang, Rachwan, Günnemann and Charpentier", 2024, "arXiv:2403.18955", "section 3")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="L1 over all slices of a group loses less KL than L1 of the filters that write its channels.",
        where=PAPER,
        scale="ResNet-20 on CIFAR-10, 55 % of the bytes, the same shapes, norms moved by the same images, 3 draws of images",
        check=partial(_on, "resnet20", 0.55, Spa(Magnitude()), SEEDS),
        broken=partial(_on, "resnet20", 0.55, Upside(), ONE),
    ),
    Claim(
        says="On a language model, L1 over all slices of a group loses less KL than L1 of the matrices that write its channels.",
        where=PAPER,
        scale="nano, 80 % of the bytes, the same shapes; nothing is drawn",
        check=partial(_on, "nano", 0.8, Spa(Magnitude()), SEEDS),
        broken=partial(_on, "nano", 0.8, Torn(), ONE),
    ),
)
