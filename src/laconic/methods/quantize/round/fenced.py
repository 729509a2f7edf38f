"""CFP, for weights: round to nearest on ranges that end where a matrix's outliers begin, which are cut there.

Ding et al. 2023 (CBQ), arXiv:2312.07950, section 3 and algorithm 1:  W becomes clip(W, -t, t) before its grid is fitted, t the largest size
of a weight of the matrix that is no outlier, found as for inputs (quantize.smooth.cfp): above a fence by quartiles a size may be one, and
of those the cut is taken that parts them best.  weight (n, m) -> codes (n, m), scale and zero (n, g). No data is needed.
Sibling: quantize.round.rtn (clip=True: ranges of each group by the squared error of its weights)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.outliers import parting
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.rtn import RTN

CARD = Card(Paper("Ding et al.", 2023, "arXiv:2312.07950", "section 3"), catalogue="cbq", sibling="quantize.round.rtn")


@dataclass(frozen=True)
class Fenced(Transform):
    """Level: a Grid. reach: of the fence, in distances between quartiles; weigh: of the variance beside the gap; clip: shrink each group's
    range besides, where that lowers the squared error of its cut weights."""

    reach: float = 1.5
    weigh: float = 1.0
    clip: bool = False

    acts_on = (Linear, Conv, Embedding)
    level = Grid

    def __post_init__(self) -> None:
        if self.reach < 0 or self.weigh < 0:
            raise ValueError(f"reach={self.reach}, weigh={self.weigh}: neither is below 0")

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        weight = weights["weight"]
        t = parting(weight.float().abs().reshape(-1), self.reach, self.weigh)
        # scales that the weights came with (of a method around this one) stay
        return RTN(clip=self.clip)(site, {**weights, "weight": weight.clamp(-t, t)}, stats, level)

    def stored(self, site: Site, level: Grid) -> int:
        return Grouped.bytes_of(*site.matrix, level)
