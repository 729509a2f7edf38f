"""Round to nearest: every weight goes to the closest point of its group's grid, which spans least to greatest weight.

The baseline of every quantization paper; the form here is that of Jacob et al. 2018, arXiv:1712.05877, section 2.1, eq. 1:
w = S (q - Z).  weight (n, m) fp32 -> codes (n, m), scale and zero (n, g).  No data is needed.
`scale` and `zero` (n, g) beside the weight are taken in place of a fit: of weights on a grid already, the codes are read off.
Sibling: quantize.round.gptq (rounds column by column and compensates)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.bits import pack
from laconic.kernels.grids import Grid, encode, fit_clipped, fit_range, storable
from laconic.methods.quantize.grid.grouped import Grouped

CARD = Card(Paper("Jacob et al.", 2018, "arXiv:1712.05877", "section 2.1, eq. 1"), catalogue="", sibling="quantize.round.gptq")

# rows rounded at once, so that a table of 100,000 rows never has a second copy in fp32
ROWS = 4 * 1024 * 1024


def round_to_nearest(weight: Tensor, grid: Grid, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """weight (n, m) -> codes (n, m) uint8, scale (n, g), zero (n, g)."""
    scale, zero = fit(weight, grid, clip)
    return encode(weight, scale, zero, grid), scale, zero


def fit(weight: Tensor, grid: Grid, clip: bool) -> tuple[Tensor, Tensor]:
    """weight (n, m) -> scale and zero (n, g)."""
    return fit_clipped(weight, grid) if clip else fit_range(weight, grid)


@dataclass(frozen=True)
class RTN(Transform):
    """Round to nearest; level: a Grid. clip: shrink each group's range where that lowers the squared error of its weights."""

    clip: bool = False

    acts_on = (Linear, Conv, Embedding)
    level = Grid

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        n, m = site.matrix
        weight = weights["weight"].reshape(n, m)
        if "scale" in weights:
            scale, zero = weights["scale"], weights["zero"]
            codes = encode(weight.float(), scale, zero, level)
            return Change(hold={site.tensors["weight"]: Grouped.of(site.shape, level, codes, scale, zero)})
        step = max(1, ROWS // m)
        # all scales first: what one can be stored as depends on the others
        fitted = [fit(weight[i : i + step].float(), level, self.clip) for i in range(0, n, step)]
        scale, zero = storable(torch.cat([s for s, _ in fitted]), level), torch.cat([z for _, z in fitted])
        packed = [
            pack(encode(weight[i : i + step].float(), scale[i : i + step], zero[i : i + step], level), level.bits)
            for i in range(0, n, step)
        ]
        joined = packed[0] if len(packed) == 1 else torch.cat(packed)
        return Change(hold={site.tensors["weight"]: Grouped.packed(site.shape, level, joined, scale, zero)})

    def stored(self, site: Site, level: Grid) -> int:
        return Grouped.bytes_of(*site.matrix, level)
