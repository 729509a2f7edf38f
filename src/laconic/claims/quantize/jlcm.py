"""Claims of JLCM's clusters: several codebooks against one, and clusters of rows alike against clusters by chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import SEEDS, Bench, Duel, duel, gathered, held, layer_error, on, seen, spread
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.methods.quantize.grid.clusters import Clustered
from laconic.methods.quantize.round.jlcm import JLCM, Clusters, alike, fitted

LEVELS = (Clusters(3, 4), Clusters(2, 4))
P = Paper("Yvinec et al.", 2023, "arXiv:2309.17361", "section 4, table 1")


@dataclass(frozen=True)
class Mixed(Transform):
    """Clusters by chance, of the same sizes in bytes."""

    seed: int

    acts_on = (Linear,)
    level = Clusters

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Clusters) -> Change:
        n, m = site.matrix
        groups = min(level.groups, n)
        member = torch.arange(n)[torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))] % groups
        codes, tables = fitted(weights["weight"].float().reshape(n, m), member, level.bits, groups)
        return Change(hold={site.tensors["weight"]: Clustered.of(site.shape, codes, tables, member)})

    def stored(self, site: Site, level: Clusters) -> int:
        return JLCM().stored(site, level)


@dataclass(frozen=True)
class Astray(Transform):
    """The stand-in: each row is read by the table of the next cluster."""

    acts_on = (Linear,)
    level = Clusters

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Clusters) -> Change:
        n, m = site.matrix
        groups, weight = min(level.groups, n), weights["weight"].float().reshape(n, m)
        member = alike(weight, groups)
        codes, tables = fitted(weight, member, level.bits, groups)
        return Change(hold={site.tensors["weight"]: Clustered.of(site.shape, codes, tables.roll(1, 0), member)})

    def stored(self, site: Site, level: Clusters) -> int:
        return JLCM().stored(site, level)


@gathered
def _against(ours: Sequence[Transform], theirs: Sequence[Transform], alone: bool, names: tuple[str, str], bench: Bench) -> Iterator[Duel]:
    for level in LEVELS:
        rival = Clusters(level.bits, 1) if alone else level
        pairs = [(ours, level), (theirs, rival)]
        yield duel(f"{level.bits} bits", *[[seen(bench, one, at) for one in which] for which, at in pairs], names=names)
        for name, (which, at) in zip(names, pairs, strict=True):
            errors = [layer_error(bench, held(bench, one, at)) for one in which]
            yield [], {f"{level.bits} bits: error of layers, {name}": spread(errors, "share")}


def check(name: str, ours: Sequence[Transform], theirs: Sequence[Transform], alone: bool, names: tuple[str, str], lab: Lab) -> Verdict:
    """Codebooks of clusters against others."""
    return on(lab, name, partial(_against, ours, lab.draws(theirs), alone, names))


OURS, BROKEN, CHANCE = (JLCM(),), (Astray(),), tuple(Mixed(seed) for seed in SEEDS)
SCALE = "all matrices of the blocks, 3 and 2 bits, 4 codebooks a matrix"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 3 and 2 bits, codebooks of clusters of rows alike give a lower KL and perplexity than codebooks of clusters by chance.",
        where=P,
        scale=f"nano, {SCALE}, 3 draws of the clusters",
        check=partial(check, "nano", OURS, CHANCE, False, ("alike", "by chance")),
        broken=partial(check, "nano", BROKEN, CHANCE, False, ("by another table", "by chance")),
    ),
    Claim(
        says="At 3 and 2 bits, codebooks of clusters give a lower KL and perplexity than one codebook, which takes fewer bytes.",
        where=P,
        scale=f"nano, {SCALE} or one",
        check=partial(check, "nano", OURS, OURS, True, ("clusters", "one codebook")),
        broken=partial(check, "nano", BROKEN, OURS, True, ("by another table", "one codebook")),
    ),
    Claim(
        says="At 3 and 2 bits, codebooks of clusters of rows alike give a lower KL and perplexity than codebooks of clusters by chance, "
        "on a model trained by others.",
        where=P,
        scale=f"stories260k on TinyStories, {SCALE}, 3 draws of the clusters",
        check=partial(check, "stories260k", OURS, CHANCE, False, ("alike", "by chance")),
        broken=partial(check, "stories260k", BROKEN, CHANCE, False, ("by another table", "by chance")),
    ),
    Claim(
        says="At 3 and 2 bits, codebooks of clusters give a lower KL and perplexity than one codebook, which takes fewer bytes, on a "
        "model trained by others.",
        where=P,
        scale=f"stories260k on TinyStories, {SCALE} or one",
        check=partial(check, "stories260k", OURS, OURS, True, ("clusters", "one codebook")),
        broken=partial(check, "stories260k", BROKEN, OURS, True, ("by another table", "one codebook")),
    ),
)
