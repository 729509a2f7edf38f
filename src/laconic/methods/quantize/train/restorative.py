"""PTQ1.61's quantization preprocessing: low-rank corrections of compressed weights, learned, and merged into what is compressed anew.

Zhao et al. 2025, arXiv:2502.13179, section 3.4, with the restorative LoRA of the authors' code:  W' = Q(W) + (a / r) B A,  A (r, m) drawn,
B (n, r) zero at first, Q(W) fixed.  Trained to predict text in the paper, here to give the original's predictions on the calibration text;
what comes out, dense, lies near to what one bit a weight can hold, row by row, and takes the original's place when all is compressed again.
In a recipe it stands under `restore`. Under `tune`, it is rounded to the form that was held (to its scales, to its signs), which loses most
of it.  Sibling: quantize.residual.lorc (the correction is stored)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import Lesson, Objective
from laconic.kernels.grids import encode
from laconic.kernels.losses import Divergence
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.grid.signs import Signs

CARD = Card(
    Paper("Zhao et al.", 2025, "arXiv:2502.13179", "section 3.4"),
    catalogue="ptq161",
    sibling="quantize.residual.lorc",
    exceptions={
        "a soft form computes what it stores": "the correction is dense, and what is stored is rounded again",
        "every parameter learns at once": "A moves nothing while B is zero, as in LoRA",
    },
)


class Corrected(Soft):
    """A form as it is, and a low-rank correction. a (r, m), b (n, r)."""

    held: Tensor

    def __init__(self, form: Grouped | Signs, rank: int, alpha: float) -> None:
        super().__init__()
        self.shape, self.base, self.factor = form.shape, form, alpha / rank
        n, m = form.matrix
        rank = min(rank, n, m)
        self.register_buffer("held", form.dense().reshape(n, m))
        draw = torch.Generator().manual_seed(n * 65537 + m)
        bound = 1 / math.sqrt(max(m, 1))
        self.a = nn.Parameter(torch.empty(rank, m).uniform_(-bound, bound, generator=draw))
        self.b = nn.Parameter(torch.zeros(n, rank))

    def dense(self) -> Tensor:
        return (self.held + self.factor * (self.b @ self.a)).reshape(self.shape)

    def harden(self) -> Grouped | Signs:
        with torch.no_grad():
            weight = self.dense().reshape(self.base.matrix)
            if isinstance(self.base, Signs):
                signs, row, mean = self.base.plain()
                # where nothing was moved the signs stay, which numbers in 16 bits could not tell
                column = self.base.column.float()
                up = torch.where(weight == self.held, signs > 0, (weight - mean * column) * column.sign() * row.sign() >= 0)
                return Signs.of(self.shape, up, row[:, 0], mean[:, 0], column)
            codes, scale, zero = self.base.plain()
            found = torch.where(weight == self.held, codes, encode(weight, scale, zero, self.base.grid))
            return Grouped.of(self.shape, self.base.grid, found, scale, zero)


def soften(held: Packed, target: Tensor, rank: int, alpha: float) -> Soft | None:
    """Signs, and codes on a grid, with a correction; forms of any other kind stay, since no rate moves what they could learn."""
    return Corrected(held, rank, alpha) if isinstance(held, Grouped | Signs) else held.coded() or held.soften(target)


KL = Divergence()


@dataclass(frozen=True)
class Restorative(Lesson):
    """Defaults: rank 64 and alpha 16, 10,000 steps of 2 sequences at a rate of 0.0001 that falls along a cosine, as in the authors' code.
    Fewer steps want a higher rate."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("a", 1e-4), ("b", 1e-4), ("step", 0.0), ("table", 0.0))
    steps: int = 10_000
    batch: int = 2
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    narrow: ClassVar[bool] = True
    rank: int = 64
    alpha: float = 16.0

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(soften, rank=self.rank, alpha=self.alpha))
