"""SmoothQuant: what makes inputs hard to round, a few loud channels, is moved into the weights by a scale that leaves the product as it is.

Xiao et al. 2022, arXiv:2211.10438, section 4, eq. 3 and 4:  Y = (X diag(s)^-1) (diag(s) W),  s_j = max |X_j|^a / max |W_j|^(1 - a),
a = 0.5 for most models, 0.75 to 0.9 for those with louder channels.  max |X_j| (m,) over calibration tokens, max |W_j| (m,) over all
matrices that share the input; s is 1 where either is dead.  1 / s goes into the norm before attention and feed-forward, or with `inner`
also into v and up.  What is left is rounded by quantize.round.inputs (W8A8), which a recipe's choices name.
Sibling: quantize.smooth.awq (for weights alone: searched, by mean sizes)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Edge, Norm, Site
from laconic.core.statistic import Peaks, Statistic
from laconic.core.transform import Align, Change, Stats, Stretched
from laconic.methods.quantize.smooth.awq import columns, matrices

CARD = Card(Paper("Xiao et al.", 2022, "arXiv:2211.10438", "section 4, eq. 3-4"), catalogue="", sibling="quantize.smooth.awq")


def migrated(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Largest sizes of inputs and weights by channel (m,) -> s (m,). Eq. 4."""
    live = (inputs > 0) & (weights > 0)
    s = inputs.clamp(min=1e-30).pow(strength) / weights.clamp(min=1e-30).pow(1 - strength)
    return torch.where(live, s.clamp(1e-5, 1e5), torch.ones_like(s))


@dataclass(frozen=True)
class SmoothQuant(Align):
    """alpha: how much of the difficulty goes into the weights, 0 to 1. inner: also where a matrix and no norm gives the input."""

    alpha: float = 0.5
    inner: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: the migration strength is 0 to 1")

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        normed = any(isinstance(member.site.kind, Norm) for member in edge.writers)
        # all readers see the same input; a router, which comes first, sees that of all experts
        return ((edge.readers[0].site, Peaks()),) if matrices(edge) and (normed or self.inner) else ()

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        seen = stats.get(edge.readers[0].site.name, {}) if edge.readers else {}
        # an expert may have seen nothing
        if Peaks() not in seen:
            return Change()
        at, weights = columns(edge), torch.stack([read(member.site).abs().amax(0) for member in matrices(edge)]).amax(0)
        s = migrated(seen[Peaks()][at].amax(1), weights[at].amax(1), self.alpha)
        return Change(move=((edge, Stretched(1 / s)),))
