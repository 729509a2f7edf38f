"""LoRC: a low-rank matrix added to a quantized one makes up for part of the rounding error.

Yao et al. 2023 (ZeroQuant-V2), arXiv:2303.08302, section 5: E = W - W_q = U S V;  W is held as W_q + (U_r sqrt(S_r)) (sqrt(S_r) V_r).
weight (n, m) -> Sum(W_q, Product((n, r), (r, m))).  Both factors are stored with `factor_bits` bits (the paper finds 8 free).
Bytes: those of W_q plus r (n + m) factor_bits / 8 and the factors' scales.
Sibling: quantize.round.rtn (the bare quantizer); any quantizer of this family can come first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Product, Sum
from laconic.core.site import Conv, Linear, Site
from laconic.core.transform import Change, Stats, Transform, at_level
from laconic.kernels.grids import Grid
from laconic.kernels.lowrank import low_rank
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.rtn import round_to_nearest

CARD = Card(Paper("Yao et al.", 2023, "arXiv:2303.08302", "section 5"), catalogue="lorc", sibling="quantize.round.rtn")


@dataclass(frozen=True)
class Compensated:
    """Level: the grid of the quantized part and the rank of the correction."""

    first: Grid
    rank: int = 8


@dataclass(frozen=True)
class LoRC(Transform):
    """first: the quantizer whose error is made up for; factor_bits: bits of the two factors; factor_group: weights a scale."""

    first: Transform
    factor_bits: int = 8
    factor_group: int = 128

    acts_on = (Linear, Conv)
    level = Compensated

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        """What the first quantizer wants."""
        return self.first.wants

    def _factor_grid(self) -> Grid:
        return Grid(self.factor_bits, self.factor_group, symmetric=True)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Compensated) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Compensated]) -> Iterator[Change]:
        """The first quantizer's levels together, then each one's correction."""
        for level, change in zip(levels, self.first.several(site, weights, stats, [level.first for level in levels]), strict=True):
            base = change.hold[site.tensors["weight"]]
            error = (weights["weight"].float().reshape(base.shape) - base.dense()).reshape(site.matrix)
            left, right = low_rank(error, level.rank)
            correction = Product(self._held(left.T.contiguous()), self._held(right))
            yield Change(hold={site.tensors["weight"]: Sum(base, correction)}, notes=change.notes)

    def _held(self, factor: Tensor) -> Packed:
        grid = self._factor_grid()
        return Grouped.of(tuple(factor.shape), grid, *round_to_nearest(factor, grid))

    def stored(self, site: Site, level: Compensated) -> int:
        n, m = site.matrix
        rank = min(level.rank, n, m)
        return (
            self.first.stored(site, at_level(self.first, level.first))
            + Grouped.bytes_of(rank, n, self._factor_grid())
            + Grouped.bytes_of(rank, m, self._factor_grid())
        )
