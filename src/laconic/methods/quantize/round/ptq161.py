"""PTQ1.61: the input channels that are loudest in 4 bits, all others in one, about 1.6 bits a weight with everything counted.

Zhao et al. 2025, arXiv:2502.13179, section 3.2 and 3.3.  Of the m input channels the share with the largest |x| over the calibration tokens
is salient: these columns go to a grid of 4 bits with one scale and zero a row. The others are binarized, row by row:
W ~ alpha sign(W - mu) + mu, mu the mean of the row, alpha the mean distance from it (the paper's mean size of a weight, where mu is zero).
weight (n, m), of a convolution a column for each input channel and place of the kernel; alpha, mu (n,). Which columns are salient is said
once for a whole matrix, since masks of single weights would cost a bit a weight: listed by number, 32 share / n bits a weight, where the
paper's mask takes 1 / n.  What makes it good is learned afterwards, `quantize.train.scales`; factors of columns begin at one.
Where nothing was seen of the inputs (an expert without tokens) the columns of the largest weights are salient, which is noted.
Sibling: quantize.round.vptq (outlying columns apart, vectors for the rest)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Linear, Site
from laconic.core.statistic import Peaks
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid, encode, fit_range
from laconic.methods.quantize.grid.apart import Apart, others
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.grid.signs import Signs

CARD = Card(Paper("Zhao et al.", 2025, "arXiv:2502.13179", "section 3.2, 3.3"), catalogue="ptq161", sibling="quantize.round.vptq")


def salient(peaks: Tensor, count: int) -> Tensor:
    """peaks (m,): the largest size of each input channel -> the `count` loudest channels, rising; of equal ones the first."""
    return peaks.argsort(descending=True, stable=True)[:count].sort().values


def binarized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight (n, m) -> up (n, m) bool, alpha (n,), mu (n,)."""
    mu = weight.mean(1, keepdim=True)
    return weight >= mu, (weight - mu).abs().mean(1), mu[:, 0]


@dataclass(frozen=True)
class Salient:
    """Level: the share of input channels that are held in `bits`; the others have one bit."""

    share: float = 0.2
    bits: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share}: of the channels from none to less than all are salient")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: salient channels have 2 to 8 bits")

    def count(self, m: int) -> int:
        """Salient channels of m."""
        return int(self.share * m)

    @property
    def fine(self) -> Grid:
        """Of the salient columns."""
        return Grid(self.bits, None)


@dataclass(frozen=True)
class PTQ161(Transform):
    """Signs, and salient channels apart."""

    acts_on = (Linear, Conv)
    level = Salient
    wants = (Peaks(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Salient) -> Change:
        weight = weights["weight"].float().reshape(site.matrix)
        m = site.matrix[1]
        peaks, notes = stats[Peaks()], []
        if not bool(peaks.any()):
            peaks, notes = weight.abs().amax(0), [f"{site.name}: no input was seen, the columns of the largest weights are salient"]
        columns = salient(peaks, level.count(m))
        rest = weight[:, others(columns, m)]
        signs = *binarized(rest), torch.ones(rest.shape[1])
        if not len(columns):
            return Change(hold={site.tensors["weight"]: Signs.of(site.shape, *signs)}, notes=tuple(notes))
        few = weight[:, columns]
        scale, zero = fit_range(few, level.fine)
        held = Grouped.of(tuple(few.shape), level.fine, encode(few, scale, zero, level.fine), scale, zero)
        return Change(
            hold={site.tensors["weight"]: Apart(site.shape, Signs.of(tuple(rest.shape), *signs), held, columns)}, notes=tuple(notes)
        )

    def stored(self, site: Site, level: Salient) -> int:
        n, m = site.matrix
        count = level.count(m)
        return Signs.bytes_of(n, m - count) + (Grouped.bytes_of(n, count, level.fine) + 4 * count if count else 0)
