"""SPA: a set of coupled channels is worth what an elementwise score gives all of its slices together.

Wang, Rachwan, Günnemann and Charpentier 2024, arXiv:2403.18955, section 3.  With s any elementwise score and C_i the entries of all
matrices of a group that fall with canonical index i:  S_i = AGG over C_i of s,  AGG the sum or the mean;  with `normalize`, S_i is divided
by its mean over the group, so that groups of unlike size and depth can be ranked together.  What stays is left as it is.
weights (n, m[, *kernel]) of each matrix or table of the group, stats as `score` wants -> (width,), higher = keep.  Norms have no say.
Sibling: prune.cut.obspa (scores by the error that follows, and moves what stays to make up for it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.score import Score, Unit
from laconic.core.site import Conv, Embedding, Group, Linear, Member, Site
from laconic.core.transform import Change, Cut, Stats

CARD = Card(
    Paper("Wang, Rachwan, Günnemann and Charpentier", 2024, "arXiv:2403.18955", "section 3"),
    catalogue="spa",
    sibling="prune.cut.obspa",
)


def matrices(group: Group) -> tuple[Member, ...]:
    """The members that are matrices or tables: norms and what a scan holds have no say."""
    return tuple(member for member in group.members if isinstance(member.site.kind, Linear | Conv | Embedding))


def coupled_importance(width: int, scored: Sequence[tuple[Member, Tensor]], *, mean: bool = False, normalize: bool = True) -> Tensor:
    """scored: members with scores of the shape of their weights -> (width,) the sum or mean over all slices that fall together; divided
    by its mean over the group where `normalize`."""
    total, count = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for member, score in scored:
        slices = score.movedim(member.axis, 0).flatten(1).double()
        owner = torch.tensor([i for i in range(width) for _ in member.index(i)])
        own = torch.tensor([j for i in range(width) for j in member.index(i)])
        total.index_add_(0, owner, slices.sum(1)[own])
        count.index_add_(0, owner, torch.full((len(own),), float(slices.shape[1]), dtype=torch.float64))
    worth = total / count.clamp(min=1) if mean else total
    if normalize and float(worth.abs().mean()) > 0:
        worth = worth / worth.abs().mean()
    return worth.float()


@dataclass(frozen=True)
class Spa(Cut):
    """score: what an entry is worth; over: how a set of slices is summed up; normalize: by the group's mean."""

    score: Score
    over: Literal["sum", "mean"] = "sum"
    normalize: bool = True

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        """What the score wants."""
        return self.score.wants

    def sites(self, group: Group) -> tuple[Site, ...]:
        return tuple({m.site.name: m.site for m in matrices(group) if self.wants and not isinstance(m.site.kind, Embedding)}.values())

    def worth(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Tensor:
        scored = []
        for member in matrices(group):
            weight = weights[member.site.name]
            unit = Unit(member.site, weight.reshape(member.site.matrix))
            scored.append((member, self.score(unit, stats.get(member.site.name, {})).reshape(weight.shape)))
        return coupled_importance(group.width, scored, mean=self.over == "mean", normalize=self.normalize)

    def __call__(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], kept: tuple[int, ...]) -> Change:
        gone = set(range(group.width)).difference(kept)
        fold = {}
        for member in group.members:
            if member.reads and member.site.name in weights and gone:
                new = weights[member.site.name].clone()
                new.index_fill_(1, torch.tensor(member.slices(sorted(gone)), dtype=torch.int64), 0.0)
                fold[member.site.tensors["weight"]] = new
        return Change(cut=((group, kept),), fold=fold)
