"""GPTQ: rounds a layer's columns one by one and pushes each error onto the columns not yet rounded, by the inverse Hessian.

Frantar et al. 2023, arXiv:2210.17323, algorithm 1, eq. 2-3.  For column q with inverse-Hessian Cholesky factor U:
e = (w_q - quant(w_q)) / U_qq;  w_j -= e U_qj for j > q.  H = 2 mean(x xT) + damping * mean(diag) I.
weight (n, m), gram (m, m) -> codes (n, m), scale and zero (n, g).  Groups are fitted when the walk reaches them. A convolution with groups
has a Gram of each, and rows are rounded by their own.  order="activation" visits the loudest columns first, as the authors' code does
with --act-order --static-groups (others: desc_act, actorder=weight): groups are fitted beforehand and stay in order as they are stored.
Dead columns and singular Hessians are damped until they factor and named in the Change's notes; nothing becomes NaN.
Sibling: quantize.round.rtn (no compensation)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.statistic import Gram, by_rows
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.obs import inverse_factor, remarks, round_columns
from laconic.methods.quantize.grid.grouped import Grouped

CARD = Card(Paper("Frantar et al.", 2023, "arXiv:2210.17323", "algorithm 1"), catalogue="", sibling="quantize.round.rtn")

# weights of all levels that are swept together (fp32: 64 MB)
STACKED = 16 * 1024 * 1024


@dataclass(frozen=True)
class GPTQ(Transform):
    """damping: fraction of the Hessian's mean diagonal; block: columns between lazy updates; order: visit columns as stored or by
    falling activation energy (then scales are fixed beforehand); clip: shrink each group's range where that lowers its error."""

    damping: float = 0.01
    block: int = 128
    order: Literal["stored", "activation"] = "stored"
    clip: bool = False

    acts_on = (Linear, Conv, Embedding)
    level = Grid
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Grid]) -> Iterator[Change]:
        """All levels in one sweep over the columns, with one factorization."""
        n, m = site.matrix
        weight = weights["weight"].reshape(n, m).float()
        parts = []
        for rows, gram in by_rows(stats[Gram()], n):
            order = torch.argsort(gram.diagonal(), descending=True, stable=True) if self.order == "activation" else None
            factor = inverse_factor(gram if order is None else gram[order][:, order], self.damping)
            parts.append((rows, factor, gram.diagonal() if self.clip else None, order))
        notes = remarks(site.name, [factor for _, factor, _, _ in parts], self.damping, "were rounded to nearest")
        # as many levels at once as keep the stacked rows small
        step = max(1, STACKED // (n * m))
        for first in range(0, len(levels), step):
            some = levels[first : first + step]
            swept = [
                round_columns(weight[rows], factor, some, importance=importance, block=self.block, order=order)
                for rows, factor, importance, order in parts
            ]
            for level, found in zip(some, zip(*swept, strict=True), strict=True):
                rounded = [torch.cat(piece) for piece in zip(*found, strict=True)]
                yield Change(hold={site.tensors["weight"]: Grouped.of(site.shape, level, *rounded)}, notes=notes)

    def stored(self, site: Site, level: Grid) -> int:
        return Grouped.bytes_of(*site.matrix, level)
