"""Round to nearest on ranges that are cut where this lowers the error of what a group gives, searched over a grid of shares.

Lin et al. 2023 (AWQ), arXiv:2306.00978, section 3.2, in the form of the authors' code: the weights of each group of a row are cut at
c max |w|, c = argmin over [0.5, 1] of the mean of (Q(w) x_g - w x_g)^2 over tokens, x_g the inputs of the group's own columns.  weight
(n, m), gram (m, m) = mean of x xT, whose blocks on the diagonal say that error -> codes (n, m), scale and zero (n, g).  The authors leave
q and k as they are, whose errors meet in a product; a recipe says so by `where`.
Sibling: quantize.round.rtn (clip=True: by the squared error of the weights, without data)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.statistic import Gram, by_rows
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid, fit_by_output, storable
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.rtn import ROWS, RTN

CARD = Card(Paper("Lin et al.", 2023, "arXiv:2306.00978", "section 3.2"), catalogue="", sibling="quantize.round.rtn")


@dataclass(frozen=True)
class Clipped(Transform):
    """Round to nearest; level: a Grid. least: the smallest share of a group's largest weight at which it may be cut; steps: how many
    shares below 1 are tried."""

    least: float = 0.5
    steps: int = 10

    acts_on = (Linear, Conv, Embedding)
    level = Grid
    wants = (Gram(),)

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"least={self.least}: a share is above 0, at most 1")

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        n, m = site.matrix
        weight, step = weights["weight"].reshape(n, m), max(1, ROWS // m)
        fitted = [
            fit_by_output(some.float(), level, gram, least=self.least, steps=self.steps)
            for rows, gram in by_rows(stats[Gram()], n)
            for some in weight[rows].split(step)
        ]
        scale, zero = (torch.cat(found) for found in zip(*fitted, strict=True))
        return RTN()(site, {"weight": weight, "scale": storable(scale, level), "zero": zero}, stats, level)

    def stored(self, site: Site, level: Grid) -> int:
        return Grouped.bytes_of(*site.matrix, level)
