"""ZeroQuant-FP: GPTQ's walk over columns with floats of few bits, or a codebook, in the place of whole numbers.

Wu et al. 2023, arXiv:2307.09782, section 3: for column q with inverse-Hessian Cholesky factor U, e = (w_q - quant(w_q)) / U_qq,
w_j -= e U_qj for j > q, quant the nearest value of the format times the group's scale; groups are fitted when the walk reaches them. A
codebook is fitted before, as quantize.round.lloyd does.
weight (n, m), gram (m, m) -> codes (n, m) uint8, scale (n, g) as stored. A convolution with groups has a Gram of each, and rows are rounded
by their own. Dead columns and singular Hessians as in GPTQ.
Sibling: quantize.round.gptq (even steps)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.statistic import Gram, by_rows
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.levels import Levels, fit_scale, fit_table, whole_of
from laconic.kernels.obs import inverse_factor, remarks, round_columns_to
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.lloyd import importance

CARD = Card(Paper("Wu et al.", 2023, "arXiv:2307.09782", "section 3"), catalogue="", sibling="quantize.round.gptq")


@dataclass(frozen=True)
class ZeroQuantFP(Transform):
    """damping: fraction of the Hessian's mean diagonal; block: columns between lazy updates; clip: change each group's scale where that
    lowers its error."""

    damping: float = 0.01
    block: int = 128
    clip: bool = False

    acts_on = (Linear, Conv, Embedding)
    level = Levels
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Levels) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Levels]) -> Iterator[Change]:
        """All levels with one factorization."""
        n, m = site.matrix
        weight = weights["weight"].reshape(n, m).float()
        parts = [(rows, inverse_factor(gram, self.damping), gram.diagonal()) for rows, gram in by_rows(stats[Gram()], n)]
        notes = remarks(site.name, [factor for _, factor, _ in parts], self.damping, "were rounded to nearest")
        for level in levels:
            whole = whole_of(weight.abs().max(), level)
            table = None
            if level.table == "codebook":
                table = fit_table(weight, fit_scale(weight, level, whole), level, importance(stats, n))
            found = [
                round_columns_to(weight[rows], factor, level, table, whole, importance=diagonal if self.clip else None, block=self.block)
                for rows, factor, diagonal in parts
            ]
            codes, scale = (torch.cat(piece) for piece in zip(*found, strict=True))
            yield Change(hold={site.tensors["weight"]: Leveled.of(site.shape, level, codes, scale, whole, table)}, notes=notes)

    def stored(self, site: Site, level: Levels) -> int:
        return Leveled.bytes_of(*site.matrix, level)
