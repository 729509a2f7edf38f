"""OBSPA: coupled channels go where the least output error follows, and the matrices that read them make up for it; no training after.

Wang, Rachwan, Günnemann and Charpentier 2024, arXiv:2403.18955, section 3 (optimal-brain SPA), for the setting without fine-tuning.  With
H = mean of x xT of a matrix's own input, from calibration data, data of another kind or noise:  s_nj = w_nj^2 / [H^-1]_jj, summed over
the slices that fall together;  with G the columns that go and K those that stay,  w_K -= w_G ([H^-1]_GG)^-1 [H^-1]_GK.
weights (n, m[, *kernel]) and gram (m, m) of each matrix of the group -> (width,) and new weights of its readers.  Dead channels go first;
a singular Hessian is damped until it factors, and notes say so.
Sibling: prune.cut.spa (any score, what stays is left as it is)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Group, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Cut, Stats
from laconic.kernels.obs import removal_cost, without_columns
from laconic.methods.prune.cut.spa import coupled_importance

CARD = Card(
    Paper("Wang, Rachwan, Günnemann and Charpentier", 2024, "arXiv:2403.18955", "section 3, optimal-brain SPA"),
    catalogue="spa",
    sibling="prune.cut.spa",
)


@dataclass(frozen=True)
class Obspa(Cut):
    """damping: fraction of the Hessian's mean diagonal; normalize: scores by the group's mean."""

    damping: float = 0.01
    normalize: bool = True

    wants = (Gram(),)

    def sites(self, group: Group) -> tuple[Site, ...]:
        return tuple(member.site for member in group.members if member.reads)

    def worth(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Tensor:
        scored = []
        for member in group.members:
            if member.reads:
                weight = weights[member.site.name]
                cost = removal_cost(weight.reshape(member.site.matrix), stats[member.site.name][Gram()], self.damping)
                scored.append((member, cost.reshape(weight.shape)))
        return coupled_importance(group.width, scored, normalize=self.normalize)

    def __call__(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], kept: tuple[int, ...]) -> Change:
        gone = sorted(set(range(group.width)).difference(kept))
        fold, notes = {}, []
        for member in group.members:
            if member.reads and member.site.name in weights and gone:
                weight = weights[member.site.name]
                mask = torch.zeros(weight.shape[1:], dtype=torch.bool)
                mask[member.slices(gone)] = True
                new, used = without_columns(
                    weight.reshape(member.site.matrix), stats[member.site.name][Gram()], mask.flatten(), self.damping
                )
                fold[member.site.tensors["weight"]] = new.reshape(weight.shape)
                if used > self.damping:
                    notes.append(f"{member.site.name}: the Hessian is singular; damping was raised from {self.damping:g} to {used:g}")
        return Change(cut=((group, kept),), fold=fold, notes=tuple(notes))
