"""PV-Tuning: codes and numbers of a compressed model learned together by exchanging few codes a step, with no weights kept behind them.

Malinovskii et al. 2024, arXiv:2405.14852, section 3.2, algorithms 2 and 3; the objective is KL from the original's predictions.
P step: codes stay, and Adam moves what is continuous (scales, tables).  V step: these stay, and with U Adam's update for the gradient in
the dense weights W, the groups S with the greatest |U| become what can be represented nearest to W - U there, in the order of |U| while
|dW| / |W| of the matrix stays at or below `trust`.  A step in few groups may be large, so that codes really change; a small one in all of
them rounds back to where it was.  Both steps take the gradient of the same batch.
A form says which weights share a code and what is nearest (`core.packed.Coded`), so this learns whatever holds codes: integers, levels,
vectors, also inside a sum, sparse or transposed.  U is counted in sizes (root mean square) of the matrix.
Memory: four fp32 numbers a weight (proposal, gradient, two moments).  It keeps every form and every byte.
Sibling: quantize.train.straight (keeps a position behind each code, all move a little)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Coded, Packed, Soft
from laconic.core.transform import Lesson, Objective
from laconic.kernels.losses import Divergence

CARD = Card(Paper("Malinovskii et al.", 2024, "arXiv:2405.14852", "section 3.2"), catalogue="pv-tuning", sibling="quantize.train.straight")

KL = Divergence()


def exchanged(coded: Coded, update: Tensor, share: float, trust: float) -> int:
    """Exchanges codes so that the weights go along update (of the form's shape): of the `share` of groups where it is greatest, those first
    in that order whose new weights are within `trust` of the matrix's norm together. How many codes changed."""
    before = coded.dense().reshape(coded.matrix)
    groups, along = coded.groups(before), coded.groups(update.reshape(coded.matrix))
    size = along.square().sum(1)
    # in a stable order, so that the same run gives the same codes
    index = size.argsort(descending=True, stable=True)[: max(1, int(share * len(size)))]
    codes, weights = coded.nearest(index, groups[index] + along[index])
    # the ragged end of a group lies beyond the matrix
    inside = coded.groups(torch.ones_like(before))[index]
    change = (weights - groups[index]) * inside
    # sums of entries are sought one table after another, which may find less than there was
    nearer = (change - along[index]).square().sum(1) < size[index]
    moved = torch.where(nearer, change.square().sum(1), 0.0)
    taken = (moved > 0) & (moved.double().cumsum(0) <= (trust * before.double().norm()).square())
    coded.exchange(index[taken], codes[..., taken])
    return int(taken.sum())


class Revised(Soft):
    """A form of codes, revised after each step. nudge, of its shape: what the optimiser proposes to add to the weights, in units of their
    size; it is zero before and after each step, and its gradient is that of the weights."""

    def __init__(self, coded: Coded, share: float, trust: float) -> None:
        super().__init__()
        self.shape, self.inner, self.share, self.trust = coded.shape, coded, share, trust
        self.nudge = nn.Parameter(torch.zeros(coded.shape))
        # codes that the last step exchanged
        self.flips = 0

    def dense(self) -> Tensor:
        return self.inner.dense() + (self.nudge - self.nudge.detach())

    def harden(self) -> Packed:
        return self.inner.harden()

    @torch.no_grad()
    def settle(self) -> None:
        unit = self.inner.dense().square().mean().sqrt()
        self.flips = exchanged(self.inner, self.nudge * unit, self.share, self.trust)
        self.nudge.zero_()


def revised(held: Packed, target: Tensor, share: float, trust: float) -> Soft | None:
    """A form with codes, to be revised; nothing else can be."""
    coded = held.coded()
    return None if coded is None else Revised(coded, share, trust)


@dataclass(frozen=True)
class PV(Lesson):
    """share: of the groups of a matrix, how many a step looks at; trust: how far a step may move a matrix, as a share of its norm (the
    paper's 0.01, where lessons have thousands of steps; short ones, and matrices so small that one code is more than that, want more).
    Rates: nudge in sizes of the matrix, step in logarithms, table in sizes of its entries. A nudge must reach from one code to the next."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("nudge", 1.0), ("step", 3e-3), ("table", 1e-2))
    steps: int = 96
    batch: int = 4
    decay: Literal["constant", "linear", "cosine"] = "linear"
    share: float = 0.01
    trust: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 0 < self.trust <= 1:
            raise ValueError(f"share={self.share}, trust={self.trust}: shares above 0, at most 1")

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(revised, share=self.share, trust=self.trust))
