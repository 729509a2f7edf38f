"""LWC: how far each group's range is cut is learned from what its block gives out, all weights staying where they are.

Shao et al. 2023 (OmniQuant), arXiv:2308.13137, section 3.2, eq. 2:  W_q = clamp(round(W / h) + z, 0, 2^N - 1),
h = (sigmoid(c) max(W) - sigmoid(d) min(W)) / (2^N - 1),  z = -round(sigmoid(d) min(W) / h).  weight (n, m); max, min, h, z and the learned
c and d (n, g), one for each group.  Round passes gradients as they are, of z too, so that a weight beyond the range says where its end
should be.  The objective is the squared error of a block's output to the original's, on inputs that the compressed model before it gives.
It begins on the ranges that are held: at c = d = 4 where these are whole, as in the authors' code (so a range may also grow by 1.8 %), at
the c that cuts them so where they are cut.  Symmetric grids have h = 2 sigmoid(c) max |W| / (2^N - 1) and no d.  Afterwards codes, h and z
are stored, in the bytes of rounding to nearest. The paper's other half, learned scales of channels (LET), is not here.
Sibling: quantize.round.flexround (weights move too); quantize.round.clipped searches ranges where this learns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.grids import Grid, as_stored, grouped, parted, through, ungrouped
from laconic.kernels.losses import SquaredError
from laconic.methods.quantize.grid.grouped import Grouped

CARD = Card(
    Paper("Shao et al.", 2023, "arXiv:2308.13137", "section 3.2, eq. 2"),
    catalogue="",
    sibling="quantize.round.flexround",
    exceptions={
        "weights of one sign teach every parameter": "a range that ends at zero has no share of it to learn",
    },
)

# c and d of a whole range
WHOLE = 4.0


def strength(end: Tensor, furthest: Tensor) -> Tensor:
    """What c is where a range ends at `end` and the weights at `furthest`, both above zero: their share's logit, at most 4. All (n, g)."""
    share = torch.where(furthest > 0, end / furthest.clamp(min=1e-30), torch.ones_like(end))
    return share.clamp(1e-3, 1.0).logit().clamp(max=WHOLE)


def placed(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Ends of ranges (n, g) -> h as stored and z. Eq. 2."""
    top = 2**grid.bits - 1
    h = as_stored((high - low) / top, grid)
    if grid.symmetric:
        return h, torch.full_like(h, grid.middle)
    wished = -low / h
    z = (wished.detach() * grid.zero_steps).round() / grid.zero_steps
    return h, through(wished, z).clamp(0, top)


class Clipping(Soft):
    """Codes on ranges that are learned. c, d (n, g); low, high (n, g): the ends that are held, over the sigmoids they begin with."""

    low: Tensor
    high: Tensor
    runs: Tensor

    def __init__(self, held: Grouped, target: Tensor) -> None:
        super().__init__()
        self.shape, self.grid = held.shape, held.grid
        _, scale, zero = held.plain()
        self.register_buffer("runs", grouped(target.reshape(held.matrix).float(), self.grid))
        low, high = -zero * scale, (2**self.grid.bits - 1 - zero) * scale
        least, most = self.runs.amin(-1).clamp(max=0), self.runs.amax(-1).clamp(min=0)
        if self.grid.symmetric:
            self.c = nn.Parameter(strength((high - low) / 2, torch.maximum(-least, most)))
        else:
            self.c, self.d = nn.Parameter(strength(high, most)), nn.Parameter(strength(-low, -least))
        shares = self._shares()
        self.register_buffer("low", low / shares[0].detach())
        self.register_buffer("high", high / shares[1].detach())

    def _shares(self) -> tuple[Tensor, Tensor]:
        """What is left of the lower and the upper end, (n, g)."""
        upper = self.c.sigmoid()
        return upper if self.grid.symmetric else self.d.sigmoid(), upper

    def _both(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (n, g, width), h and z (n, g)."""
        lower, upper = self._shares()
        h, z = placed(self.low * lower, self.high * upper, self.grid)
        _, over = parted(z.detach()[..., None])
        wished = self.runs / h[..., None]
        steps = through(wished, (wished.detach() + over).round() - over)
        return (steps + z[..., None]).clamp(0, 2**self.grid.bits - 1), h, z

    def dense(self) -> Tensor:
        codes, h, z = self._both()
        return ungrouped((codes - z[..., None]) * h[..., None], self.matrix[1]).reshape(self.shape)

    def harden(self) -> Grouped:
        with torch.no_grad():
            codes, h, z = self._both()
            return Grouped.of(self.shape, self.grid, ungrouped(codes.round(), self.matrix[1]).to(torch.uint8), h, z)


def soften(held: Packed, target: Tensor) -> Soft | None:
    """Codes on a grid, softened so; nothing else can be."""
    return Clipping(held, target) if isinstance(held, Grouped) else None


ERROR = SquaredError()
RATE = 5e-3


@dataclass(frozen=True)
class LWC(Lesson):
    """Defaults: 20 passes over 128 calibration sequences, one a step, by Adam at a constant rate of 0.005, block by block, as in the paper
    (which takes 40 for weights in 2 bits). Fewer steps want a higher rate."""

    objective: Objective = ERROR
    rates: tuple[tuple[str, float], ...] = (("c", RATE), ("d", RATE))
    steps: int = 20 * 128
    batch: int = 1
    decay: Literal["constant", "linear", "cosine"] = "constant"
    scope: Scope = BLOCK

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, soften)
