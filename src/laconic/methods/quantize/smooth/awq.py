"""AWQ: input channels that are loud get larger weights before these are rounded, so that they lose less; what is computed stays.

Lin et al. 2023, arXiv:2306.00978, section 3.2, eq. 4 and 5:  s = s_x^a,  a = argmin over [0, 1] of || Q(W diag(s)) diag(s)^-1 X - W X ||,
s_x (m,) the mean size of each input channel, one exponent for all matrices that share an input (q, k and v; gate and up). 1 / s goes into
what gives the input: a norm, the entries of v (a head's to all that it serves), the channels of up.  weight (n, m), gram (m, m), sizes
(m,) -> s (m,).  Errors are those of the matrices' outputs, by the Gram matrix, where the authors' code takes those of the whole
attention for q, k and v. The grid is a knob, since a plan's level is not known yet: set it to what is aimed at (on stories260k, scales
found for 4 bits leave 3 % more error at 3 bits than those found for 3).
The paper's second half, clipping by the output, is quantize.round.clipped, which a recipe's choices name; any other method may stand there.
Sibling: quantize.smooth.smoothquant (for inputs in few bits, with no search)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Edge, Member, Scale, Site
from laconic.core.statistic import Gram, Sizes, Statistic
from laconic.core.transform import Align, Change, Stats, Stretched
from laconic.kernels.grids import Grid, decode, encode, fit_range
from laconic.kernels.obs import output_error

CARD = Card(Paper("Lin et al.", 2023, "arXiv:2306.00978", "section 3.2, eq. 4-5"), catalogue="", sibling="quantize.smooth.smoothquant")

# the least size of a channel, as a share of the greatest
FLOOR = 1e-4


def powered(sizes: Tensor, exponent: float) -> Tensor:
    """Mean sizes (m,) -> s = sizes^exponent (m,), the product of its greatest and least being 1. Eq. 5."""
    s = sizes.clamp(min=FLOOR * float(sizes.max())).clamp(min=1e-30).pow(exponent)
    return s / (s.max() * s.min()).sqrt()


def loss(weights: Sequence[Tensor], gram: Tensor, s: Tensor, grid: Grid) -> float:
    """Squared output error of matrices (n, m) that are rounded to nearest with their columns times s (m,), a mean over tokens. Eq. 4."""
    total = 0.0
    for weight in weights:
        scaled = weight * s
        scale, zero = fit_range(scaled, grid)
        rounded = decode(encode(scaled, scale, zero, grid), scale, zero, grid)
        total += float(output_error(rounded / s - weight, gram).sum(dtype=torch.float64))
    return total


def matrices(edge: Edge) -> tuple[Member, ...]:
    """The matrices that read what a scale along an edge would change; none where it allows no scale, where something else reads too, or
    outside of the layers. A router reads, but stays as it is, so it does not count."""
    layers = all(member.reads and "layer" in member.site.context for member in edge.readers)
    if edge.may(Scale) is None or not layers:
        return ()
    return tuple(member for member in edge.readers if member.site.roles.get("part") != "router")


def columns(edge: Edge) -> Tensor:
    """(width, copies) where each channel of an edge lies in what its readers take in."""
    return torch.tensor([list(edge.readers[0].index(i)) for i in range(edge.width)])


@dataclass(frozen=True)
class AWQ(Align):
    """bits, group: of the grid that scales are searched for. steps: exponents that are tried, besides 0."""

    bits: int = 4
    group: int | None = 128
    steps: int = 20

    def __post_init__(self) -> None:
        Grid(self.bits, self.group)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least one exponent besides 0 is tried")

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        # all readers see the same input; a router, which comes first, sees that of all experts
        return tuple((edge.readers[0].site, statistic) for statistic in (Gram(), Sizes()) if matrices(edge))

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        seen = stats.get(edge.readers[0].site.name, {}) if edge.readers else {}
        # an expert may have seen nothing
        if Gram() not in seen or not float(seen[Sizes()].max()) > 0:
            return Change()
        at, weights = columns(edge), [read(member.site) for member in matrices(edge)]
        sizes = seen[Sizes()][at].mean(1)
        grid = Grid(self.bits, self.group)
        tried = [powered(sizes, i / self.steps) for i in range(self.steps + 1)]
        losses = [loss(weights, seen[Gram()], torch.ones(at.numel()).index_put((at,), s[:, None]), grid) for s in tried]
        best = min(range(len(tried)), key=losses.__getitem__)
        return Change(move=((edge, Stretched(1 / tried[best])),)) if best else Change()
