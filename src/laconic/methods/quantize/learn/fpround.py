"""Rounding learned on a grid of floats: each weight goes to the number below it or above it, as a layer's or block's output wants.

Chen et al. 2024, arXiv:2408.06995, section 4, after Nagel et al. 2020 (AdaRound), arXiv:2004.10568, eq. 21-25, where all steps are one:
W~ = below + h(V) (above - below),  below <= W <= above neighbours on the grid, a step apart that depends on their exponent,
h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1).  To the squared error of the output is added lambda sum(1 - |2 h(V) - 1|^beta) with beta falling
from 20 to 2 after a fifth of the steps; in the end h is 0 or 1.  weight, V (n, m); split and scale of the grid stay.  V begins where the
soft weight is the float weight (beyond the ends of the grid, where it is the end); made hard there, it is rounded to nearest.
Codes of whole numbers learn as AdaRound's.  Sibling: quantize.round.adaround (even steps)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.losses import SquaredError
from laconic.kernels.splits import nearest, numbers, under
from laconic.methods.quantize.round import adaround
from laconic.methods.quantize.round.adaround import CLEAR, indecision, rectified, unrectified
from laconic.methods.quantize.round.fpquant import Single

CARD = Card(
    Paper("Chen et al.", 2024, "arXiv:2408.06995", "section 4"),
    catalogue="fp-quant-diffusion",
    sibling="quantize.round.adaround",
    exceptions={
        "a soft form computes what it stores": "h(V) lies between 0 and 1 until the penalty has driven it to an end",
    },
)


class Between(Soft):
    """Numbers of a float grid, each the one below or the one above its weight. v (n, m)."""

    scale: Tensor
    below: Tensor
    low: Tensor
    step: Tensor

    def __init__(self, held: Single, target: Tensor, weigh: float) -> None:
        super().__init__()
        self.shape, self.split, self.weigh = held.shape, held.split, weigh
        ratio = (target.reshape(held.matrix).float() / held.scale).clamp(-self.split.top, self.split.top)
        below = under(ratio, self.split)
        low, high = (numbers(rank, self.split) for rank in (below, below + 1))
        for name, tensor in (("scale", held.scale), ("below", below), ("low", low), ("step", high - low)):
            self.register_buffer(name, tensor)
        share = (ratio - low) / self.step
        up = nearest(ratio, self.split) > below
        self.v = nn.Parameter(unrectified(torch.where(up, share.clamp(min=0.5 + CLEAR), share.clamp(max=0.5 - CLEAR))))

    def dense(self) -> Tensor:
        return ((self.low + rectified(self.v) * self.step) * self.scale).reshape(self.shape)

    def penalty(self, done: float) -> Tensor | None:
        found = indecision(rectified(self.v), done)
        return None if found is None else self.weigh * found

    def harden(self) -> Single:
        with torch.no_grad():
            return Single.of(self.shape, self.split, self.below + (rectified(self.v) >= 0.5), self.scale)


def soften(held: Packed, target: Tensor, weigh: float) -> Soft | None:
    """Floats of one scale, and codes on a grid, softened so; nothing else can be."""
    return Between(held, target, weigh) if isinstance(held, Single) else adaround.soften(held, target, weigh)


ERROR = SquaredError()


@dataclass(frozen=True)
class FPRound(Lesson):
    """weigh: lambda, in proportion to the squared error summed over channels. Defaults are AdaRound's."""

    objective: Objective = ERROR
    rates: tuple[tuple[str, float], ...] = (("v", 1e-2),)
    steps: int = 10_000
    batch: int = 32
    decay: Literal["constant", "linear", "cosine"] = "constant"
    scope: Scope = BLOCK
    weigh: float = 0.01

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(soften, weigh=self.weigh))
