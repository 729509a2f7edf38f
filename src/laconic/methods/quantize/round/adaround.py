"""AdaRound: whether each weight is rounded up or down is learned from what its layer or block gives out, by a soft choice made hard.

Nagel et al. 2020, arXiv:2004.10568, section 4, eq. 21-25:  W~ = s (clip(floor(W / s) + h(V) + z, 0, 2^b - 1) - z),
h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1) with zeta = 1.1, gamma = -0.1.  To the squared error of the output is added
lambda sum(1 - |2 h(V) - 1|^beta): nothing for the first fifth of the steps, then beta falls from 20 to 2, which first lets h go where it
wants and then to 0 or 1.  weight, V (n, m) in groups of the grid that is held, whose scales and zeros stay.  V begins where the soft weight
is the float weight; made hard there, it is rounded to nearest.  Inputs are those that the compressed model before gives, the output is that
of the original on its own (asymmetric reconstruction, eq. 25); eq. 25's activation function is part of a block, and left out where a layer
is learned alone.
Memory: four fp32 numbers for each weight of the blocks that learn at once.
Sibling: quantize.round.flexround (divides: further than one step, and the grid size learns too)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.grids import grouped, parted, ungrouped
from laconic.kernels.losses import SquaredError
from laconic.methods.quantize.grid.grouped import Grouped

CARD = Card(
    Paper("Nagel et al.", 2020, "arXiv:2004.10568", "section 4, eq. 21-25"),
    catalogue="",
    sibling="quantize.round.flexround",
    exceptions={
        "a soft form computes what it stores": "h(V) lies between 0 and 1 until the penalty has driven it to an end",
    },
)

ZETA, GAMMA = 1.1, -0.1
# of the penalty: share of the steps before it begins, and beta at its begin and end
WARM, FIRST, LAST = 0.2, 20.0, 2.0
# how far from a half a soft choice begins, so that made hard it is what rounding to nearest chose, ties to even included
CLEAR = 1e-3


def rectified(v: Tensor) -> Tensor:
    """h(V), eq. 23."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def unrectified(h: Tensor) -> Tensor:
    """V with h(V) = h, for 0 <= h <= 1."""
    share = (h - GAMMA) / (ZETA - GAMMA)
    return share.logit()


def begun(wished: Tensor, below: Tensor) -> Tensor:
    """V with which a soft choice is the weight, wished in steps and the whole number below it; hard, it is the nearest."""
    rest = wished - below
    return unrectified(torch.where(wished.round() > below, rest.clamp(min=0.5 + CLEAR), rest.clamp(max=0.5 - CLEAR)))


def indecision(h: Tensor, done: float) -> Tensor | None:
    """Sum of 1 - |2 h - 1|^beta, eq. 24, after the share `done` of the steps; None while it is not counted yet."""
    if done < WARM:
        return None
    beta = LAST + (FIRST - LAST) * (1 - done) / (1 - WARM)
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


class Chosen(Soft):
    """Codes on a fixed grid, each the one below or the one above its weight. v (n, g, width)."""

    scale: Tensor
    zero: Tensor
    whole: Tensor
    below: Tensor

    def __init__(self, held: Grouped, target: Tensor, weigh: float) -> None:
        super().__init__()
        self.shape, self.grid, self.weigh = held.shape, held.grid, weigh
        _, scale, zero = held.plain()
        whole, over = parted(zero)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("whole", whole)
        wished = grouped(target.reshape(held.matrix).float(), self.grid) / scale[..., None] + over[..., None]
        self.register_buffer("below", wished.floor())
        self.v = nn.Parameter(begun(wished, self.below))

    def _codes(self, choice: Tensor) -> Tensor:
        return (self.below + choice + self.whole[..., None]).clamp(0, 2**self.grid.bits - 1)

    def dense(self) -> Tensor:
        runs = (self._codes(rectified(self.v)) - self.zero[..., None]) * self.scale[..., None]
        return ungrouped(runs, self.matrix[1]).reshape(self.shape)

    def penalty(self, done: float) -> Tensor | None:
        found = indecision(ungrouped(rectified(self.v), self.matrix[1]), done)
        return None if found is None else self.weigh * found

    def harden(self) -> Grouped:
        with torch.no_grad():
            codes = self._codes((rectified(self.v) >= 0.5).float())
            return Grouped.of(self.shape, self.grid, ungrouped(codes, self.matrix[1]).to(torch.uint8), self.scale, self.zero)


def soften(held: Packed, target: Tensor, weigh: float) -> Soft | None:
    """Codes on a grid, softened so; nothing else can be."""
    return Chosen(held, target, weigh) if isinstance(held, Grouped) else None


ERROR = SquaredError()


@dataclass(frozen=True)
class AdaRound(Lesson):
    """weigh: lambda, in proportion to the squared error summed over channels. Defaults: 10,000 steps of 32 samples and lambda of 0.01, as
    the paper and the authors' toolkit have them; Adam at a rate of 0.01; block by block, as Li et al. 2021 (BRECQ), arXiv:2102.05426, use
    it, where the paper goes layer by layer (`scope=layer`). Fewer steps want a higher rate."""

    objective: Objective = ERROR
    rates: tuple[tuple[str, float], ...] = (("v", 1e-2),)
    steps: int = 10_000
    batch: int = 32
    decay: Literal["constant", "linear", "cosine"] = "constant"
    scope: Scope = BLOCK
    weigh: float = 0.01

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(soften, weigh=self.weigh))
