"""Lloyd-Max levels: a codebook of 2^b values for each matrix, those of least squared error for its weights, and round to nearest of them.

Lloyd 1982, 10.1109/TIT.1982.1056489, section IV, method I: with u = w / scale of its group (the greatest weight becomes 1),
q_k = sum_k a u / sum_k a over what is nearest to q_k, until no level moves; a = (scale)^2 E[x_m^2], so that what is made small is the
squared error of the weights, each column counted by the mean square of its input (Kim et al. 2024, SqueezeLLM, arXiv:2306.07629, section
4.1, weigh by Fisher information in the same place, and have a codebook for each row).
weight (n, m) fp32, gram (m, m) -> codes (n, m) uint8, scale (n, g), table (2^b,) bf16.
ValueError for a level with a float format: those are quantize.round.floats'.  Sibling: quantize.round.floats (levels of a standard)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.statistic import Gram, by_rows
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.bits import pack
from laconic.kernels.levels import Levels, encode, fit_scale, fit_table, stored_scales, whole_of
from laconic.methods.quantize.grid.levels import Leveled

CARD = Card(Paper("Lloyd", 1982, "10.1109/TIT.1982.1056489", "section IV, method I"), catalogue="", sibling="quantize.round.floats")

# weights rounded at once
ROWS = 4 * 1024 * 1024


def importance(stats: Stats, n: int) -> Tensor:
    """The mean square of each column's input (m,); of a convolution with groups the mean over them."""
    return torch.stack([gram.diagonal() for _, gram in by_rows(stats[Gram()], n)]).mean(0)


@dataclass(frozen=True)
class Lloyd(Transform):
    """level: Levels with a codebook."""

    acts_on = (Linear, Conv, Embedding)
    level = Levels
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Levels) -> Change:
        n, m = site.matrix
        weight = weights["weight"].reshape(n, m)
        whole = whole_of(weight.abs().max().float(), level)
        parts = range(0, n, max(1, ROWS // m))
        scale = torch.cat([fit_scale(weight[i : i + parts.step].float(), level, whole) for i in parts])
        table = fit_table(weight, scale, level, importance(stats, n))
        codes = [pack(encode(weight[i : i + parts.step].float(), scale[i : i + parts.step], level, table), level.bits) for i in parts]
        held = Leveled(site.shape, level, torch.cat(codes), stored_scales(scale, level, whole), whole, table)
        return Change(hold={site.tensors["weight"]: held})

    def stored(self, site: Site, level: Levels) -> int:
        if level.table != "codebook":
            raise ValueError(f"table={level.table}: numbers of a format are quantize.round.floats'; name codebook")
        return Leveled.bytes_of(*site.matrix, level)
