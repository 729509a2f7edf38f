"""Drop: the weights a score ranks lowest become zero; the rest is held densely in its own dtype, or by any quantizer.

The unstructured and n:m settings of Han et al. 2015, arXiv:1506.02626, section 3, and Sun et al. 2023, arXiv:2306.11695, section 3.
weight (n, m), any Score -> Sparse(mask, values).  Bytes: n m / 8 for the mask plus those of the kept weights.
Sibling: quantize.round.rtn (fewer bits for all in place of none for some)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Dense, Packed
from laconic.core.score import NofM, PerRow, Score, Unit, keep_top
from laconic.core.site import Conv, Linear, Site
from laconic.core.transform import Change, Stats, Transform, at_level
from laconic.kernels.bits import packed_width
from laconic.kernels.grids import Grid
from laconic.methods.prune.cut.sparse import Sparse

CARD = Card(Paper("Han et al.", 2015, "arXiv:1506.02626", "section 3"), catalogue="", sibling="quantize.round.rtn")


@dataclass(frozen=True)
class Sparsity:
    """Level: `keep` of each row (a fraction), or keep `of` each run of `run` (n:m, when run is set); `grid` for the kept weights."""

    keep: float = 0.5
    run: int | None = None
    grid: Grid | None = None

    def kept(self, m: int) -> int:
        """Weights that stay in a row of m, one at least."""
        if self.run is None:
            return max(1, round(self.keep * m))
        n = round(self.keep * self.run)
        whole, rest = divmod(m, self.run)
        return whole * n + -(-n * rest // self.run)


def mask_of(score: Tensor, level: Sparsity) -> Tensor:
    """score (n, m) -> mask (n, m), the same number kept in every row."""
    if level.run is None:
        return keep_top(score, level.kept(score.shape[1]), among=PerRow())
    return keep_top(score, 1.0, among=NofM(round(level.keep * level.run), level.run))


def hold_kept(site: Site, kept: Tensor, level: Sparsity, hold: Transform | None, fit: Mapping[str, Tensor]) -> Packed:
    """kept, the weights that stay as a matrix, densely in 16 bits or by the quantizer that a level with a grid asks for; fit: `scale` and
    `zero` where they are on that grid already."""
    if (quantizer := _quantizer(level, hold)) is None:
        return Dense(kept.to(torch.bfloat16) if kept.dtype == torch.float32 else kept)
    inner = site._replace(shape=tuple(kept.shape))
    return quantizer(inner, {"weight": kept, **fit}, {}, level.grid).hold[site.tensors["weight"]]


def _quantizer(level: Sparsity, hold: Transform | None) -> Transform | None:
    if level.grid is None:
        return None
    if hold is None or hold.wants:
        raise ValueError("a level with a grid needs `hold`, a quantizer that wants no statistics, such as quantize.round.rtn")
    at_level(hold, level.grid)
    return hold


def stored_bytes(site: Site, level: Sparsity, hold: Transform | None) -> int:
    """Bytes of the mask and of the weights that stay, the same number in each row. ValueError where the level has a grid and there is no
    quantizer that does without statistics."""
    n, m = site.matrix
    kept = level.kept(m)
    quantizer = _quantizer(level, hold)
    held = 2 * n * kept if quantizer is None else quantizer.stored(site._replace(shape=(n, kept)), level.grid)
    return n * packed_width(m, 1) + held


@dataclass(frozen=True)
class Drop(Transform):
    """score: what matters; hold: the quantizer of what stays (needed where the level has a grid)."""

    score: Score
    hold: Transform | None = None

    acts_on = (Linear, Conv)
    level = Sparsity

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        """What the score wants; a quantizer of gathered weights can have no statistics of their columns."""
        return self.score.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Sparsity) -> Change:
        weight = weights["weight"].reshape(site.matrix)
        mask = mask_of(self.score(Unit(site, weight.float()), stats), level)
        values = hold_kept(site, Sparse.gather(weight, mask), level, self.hold, {})
        return Change(hold={site.tensors["weight"]: Sparse.of(site.shape, mask, values)})

    def stored(self, site: Site, level: Sparsity) -> int:
        return stored_bytes(site, level, self.hold)
