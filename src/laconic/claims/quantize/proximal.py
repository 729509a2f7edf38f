"""Claims of JLCM's joint learning: against the clusters that it begins with, and against codes that may go anywhere, in equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, Bench, held, judged, measure, on, seen, tuned
from laconic.claims.quantize.flexround import After, Swapped, beaten, error, numbers_of, sized, small
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Packed, Soft
from laconic.core.transform import Lesson
from laconic.methods.quantize.grid.clusters import Clustered, Named
from laconic.methods.quantize.round.jlcm import JLCM, Clusters
from laconic.methods.quantize.train.proximal import Proximal

LEVELS = (Clusters(3, 4), Clusters(2, 4))
OURS = Proximal(rates=(("position", 2e-2), ("table", 3e-3)))
P = Paper("Yvinec et al.", 2023, "arXiv:2309.17361", "section 4, table 2")


class Anywhere(Soft):
    """The rival: weights learn straight through to the nearest entry of their table, wherever that is. position (n, m): in sizes of the
    table."""

    def __init__(self, held: Clustered, target: Tensor) -> None:
        super().__init__()
        self.shape = held.shape
        # never exchanged: its tables and the clusters of rows
        own = self.inner = Named(held)
        self.position = nn.Parameter(target.reshape(held.matrix).float() / own.entries.unit[own.member])

    def _both(self) -> tuple[Tensor, Tensor]:
        weight = self.position * self.inner.entries.unit[self.inner.member]
        with torch.no_grad():
            return weight, self.inner.nearest(torch.arange(weight.numel()), weight.reshape(-1, 1))[0].reshape(weight.shape)

    def dense(self) -> Tensor:
        weight, at = self._both()
        entries = self.inner.entries()[self.inner.member[:, None], at]
        return (entries + weight - weight.detach()).reshape(self.shape)

    def harden(self) -> Clustered:
        with torch.no_grad():
            return Clustered.of(self.shape, self._both()[1].to(torch.uint8), self.inner.entries(), self.inner.member)


def _anywhere(held: Packed, target: Tensor) -> Soft | None:
    return Anywhere(held, target) if isinstance(held, Clustered) else None


@dataclass(frozen=True)
class Straightly(Proximal):
    """The same lesson with weights that go anywhere."""

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, _anywhere)


def _after(bench: Bench, lesson: Lesson | None, level: Clusters, seed: int, quick: bool) -> After:
    """The clusters, or what a lesson makes of them; made once."""

    def make() -> After:
        if lesson is None:
            return After(seen(bench, JLCM(), level), error(bench, held(bench, JLCM(), level)))
        forms = tuned(small(bench, quick), held(bench, JLCM(), level), sized(bench, lesson, quick), seed)
        return After(measure(bench, forms), error(bench, forms))

    found: After = bench.once(("clusters", lesson, level, seed if lesson else 0, quick), make)
    return found


def _against(ours: Lesson, rival: Lesson | None, names: tuple[str, str], seeds: Sequence[int], quick: bool, bench: Bench) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for level in LEVELS:
        draws = seeds if bench.name == "stories260k" or not quick else seeds[:1]
        mine = [_after(bench, ours, level, seed, quick) for seed in draws]
        theirs = [_after(bench, rival, level, seed, quick) for seed in (draws if rival else ONE)]
        label = f"{level.bits} bits"
        wrong += beaten(label, mine, theirs, names)
        numbers |= numbers_of(label, names[0], mine) | numbers_of(label, names[1], theirs)
    return judged(wrong, numbers)


def check(name: str, ours: Lesson, rival: Lesson | None, names: tuple[str, str], seeds: Sequence[int], lab: Lab) -> Verdict:
    """Codes and codebooks learned together against others."""
    return on(lab, name, partial(_against, ours, rival, names, lab.draws(seeds), lab.quick))


ASTRAY = replace(OURS, objective=Swapped())
# at the same rates: positions are in levels here and in sizes of the table there, of which two to eight levels are about one
RIVAL = Straightly(rates=OURS.rates)
SCALES = {
    "stories260k": "stories260k on TinyStories, all matrices of the blocks, 3 and 2 bits, 4 codebooks a matrix, 400 steps of 4 rows of 128 "
    "tokens (quick: 100), 3 draws of the rows",
    "resnet20": "ResNet-20 on CIFAR-10, all layers, 3 and 2 bits, 4 codebooks a layer, 400 steps of 32 images (quick: 50, 1 draw), 3 draws",
}

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 3 and 2 bits, codes and codebooks that learned together have a lower KL and block output error than those they began "
        "with.",
        where=P,
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", OURS, None, ("learned", "clusters alone"), SEEDS),
        broken=partial(check, "stories260k", ASTRAY, None, ("learned", "clusters alone"), ONE),
    ),
    Claim(
        says="At 3 and 2 bits, codes that move to neighbours have at most the KL and block output error of codes that move anywhere.",
        where=P,
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", OURS, RIVAL, ("to neighbours", "anywhere"), SEEDS),
        broken=partial(check, "stories260k", ASTRAY, RIVAL, ("to neighbours", "anywhere"), ONE),
    ),
    Claim(
        says="At 3 and 2 bits, codes and codebooks that learned together have a lower KL and layer output error than those they began "
        "with, in a convolutional network.",
        where=P,
        scale=SCALES["resnet20"],
        check=partial(check, "resnet20", OURS, None, ("learned", "clusters alone"), SEEDS),
        broken=partial(check, "resnet20", ASTRAY, None, ("learned", "clusters alone"), ONE),
    ),
)
