"""Round to nearest in floats of 4, 6 or 8 bits: every weight goes to the closest number that its group's scale makes of the format's.

Rouhani et al. 2023, arXiv:2310.10537, section 3, algorithm 1 (MXFP4, MXFP6, MXFP8: groups of 32, powers of two as scales: the exponent of
the greatest weight less that of the format's greatest number, what is beyond is cut), ties to the even number; NVFP4: groups of 16, scales
in e4m3 so that the greatest weight becomes 6, and one fp32 number for the matrix; bf16 scales so that the greatest weight is kept.
weight (n, m) fp32 -> codes (n, m) uint8, scale (n, g) fp32 as stored.  No data is needed.
ValueError for a level with a codebook: that is quantize.round.lloyd's.  Sibling: quantize.round.rtn (even steps)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.bits import pack
from laconic.kernels.levels import Levels, encode, fit_clipped, fit_scale, stored_scales, whole_of
from laconic.methods.quantize.grid.levels import Leveled

CARD = Card(Paper("Rouhani et al.", 2023, "arXiv:2310.10537", "section 3, algorithm 1"), catalogue="", sibling="quantize.round.rtn")

# weights rounded at once, so that a table of 100,000 rows never has a second copy in fp32
ROWS = 4 * 1024 * 1024


@dataclass(frozen=True)
class Floats(Transform):
    """Round to nearest; level: Levels of a float format. clip: change each group's scale where that lowers the squared error of its
    weights, down to a half, or to the next power of two."""

    clip: bool = False

    acts_on = (Linear, Conv, Embedding)
    level = Levels

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Levels) -> Change:
        n, m = site.matrix
        weight = weights["weight"].reshape(n, m)
        whole = whole_of(weight.abs().max().float(), level)
        codes, scales = [], []
        step = max(1, ROWS // m)
        for i in range(0, n, step):
            part = weight[i : i + step].float()
            scale = fit_clipped(part, level, None, whole) if self.clip else fit_scale(part, level, whole)
            codes.append(pack(encode(part, scale, level, None), level.bits))
            scales.append(stored_scales(scale, level, whole))
        return Change(hold={site.tensors["weight"]: Leveled(site.shape, level, torch.cat(codes), torch.cat(scales), whole, None)})

    def stored(self, site: Site, level: Levels) -> int:
        if level.table == "codebook":
            raise ValueError("table=codebook: codebooks are fitted by quantize.round.lloyd; name a float format")
        return Leveled.bytes_of(*site.matrix, level)
