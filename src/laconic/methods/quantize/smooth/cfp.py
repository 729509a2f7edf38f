"""CFP, for inputs: outlying input channels, and these alone, are made quieter by the root of how far they stand out.

Ding et al. 2023 (CBQ), arXiv:2312.07950, section 3 and algorithm 1:  s_i = sqrt(max |X_i| / t) where max |X_i| > t, else 1; t the largest
size of a channel that is no outlier. Above Q3 + 1.5 (Q3 - Q1) a channel may be one (coarse), and of those the cut is taken that parts them
best, by the squared gap between both sides less the variance of those that stay (fine).  max |X_i| (m,) over calibration tokens; 1 / s goes
into what gives the input and s into the columns of all that read it, so what is computed stays. CFP for weights, which are cut at their
own t, is quantize.round.fenced, which a recipe's choices name.
Sibling: quantize.smooth.smoothquant (all channels, by the sizes of weights too)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Edge, Site
from laconic.core.statistic import Peaks, Statistic
from laconic.core.transform import Align, Change, Stats, Stretched
from laconic.kernels.outliers import parting
from laconic.methods.quantize.smooth.awq import columns, matrices

CARD = Card(Paper("Ding et al.", 2023, "arXiv:2312.07950", "section 3"), catalogue="cbq", sibling="quantize.smooth.smoothquant")


def quieted(peaks: Tensor, reach: float, weigh: float) -> Tensor:
    """peaks (m,): the largest size of each channel -> s (m,), 1 for all but outliers."""
    t = parting(peaks, reach, weigh)
    return (peaks / t).clamp(min=1).sqrt() if t > 0 else torch.ones_like(peaks)


@dataclass(frozen=True)
class CFP(Align):
    """reach: of the fence, in distances between quartiles; weigh: of the variance beside the gap."""

    reach: float = 1.5
    weigh: float = 1.0

    def __post_init__(self) -> None:
        if self.reach < 0 or self.weigh < 0:
            raise ValueError(f"reach={self.reach}, weigh={self.weigh}: neither is below 0")

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        # all readers see the same input; a router, which comes first, sees that of all experts
        return ((edge.readers[0].site, Peaks()),) if matrices(edge) else ()

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        seen = stats.get(edge.readers[0].site.name, {}) if edge.readers else {}
        # an expert may have seen nothing
        if Peaks() not in seen:
            return Change()
        s = quieted(seen[Peaks()][columns(edge)].amax(1), self.reach, self.weigh)
        return Change(move=((edge, Stretched(1 / s)),)) if bool((s > 1).any()) else Change()
