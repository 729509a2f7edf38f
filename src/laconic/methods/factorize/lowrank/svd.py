"""Truncated SVD: a matrix is held as its best product of a given rank.

Denton et al. 2014, arXiv:1404.0736, section 3.2.  W = U S V;  W_r = (U_r sqrt(S_r)) (sqrt(S_r) V_r) has the least sum of squared
differences of all matrices of rank r, and what is left is the sum of S_i^2 over i > r (Eckart & Young 1936, 10.1007/BF02288367).
weight (n, m) -> Product((r, n) transposed, (r, m)), both in bf16.  Level: the share of the matrix's numbers that is kept,
r = share n m / (n + m) rounded down, at least 1.  Bytes: 2 r (n + m).  No data is seen, so directions that inputs never take count too.
Sibling: quantize.residual.lorc (such a product beside a quantized matrix)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Dense, Product
from laconic.core.site import Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.lowrank import low_rank

CARD = Card(Paper("Denton et al.", 2014, "arXiv:1404.0736", "section 3.2"), catalogue="", sibling="quantize.residual.lorc")


@dataclass(frozen=True)
class Kept:
    """Level: the share of a matrix's numbers that its two factors have together."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: the factors have more than none of the numbers, and at most as many (1)")

    def rank(self, n: int, m: int) -> int:
        """Of the product in place of an (n, m) matrix."""
        return max(1, int(self.share * n * m / (n + m)))


def product(left: Tensor, right: Tensor) -> Product:
    """left (n, r), right (r, m) as they are stored."""
    return Product(Dense(left.T.contiguous().to(torch.bfloat16)), Dense(right.contiguous().to(torch.bfloat16)))


@dataclass(frozen=True)
class SVD(Transform):
    """Nothing to choose but how far."""

    acts_on = (Linear,)
    level = Kept

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Kept) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Kept]) -> Iterator[Change]:
        """One decomposition serves all ranks."""
        ranks = [level.rank(*site.matrix) for level in levels]
        left, right = low_rank(weights["weight"].float(), max(ranks))
        for rank in ranks:
            yield Change(hold={site.tensors["weight"]: product(left[:, :rank], right[:rank])})

    def stored(self, site: Site, level: Kept) -> int:
        n, m = site.matrix
        return 2 * level.rank(n, m) * (n + m)
