"""PTQ1.61's quantization preprocessing: low-rank corrections of compressed weights, learned, and merged into what is compressed anew.

Zhao et al. 2025, arXiv:2502.13179, section 3.4, with the restorative LoRA of the authors' code:  W' = Q(W) + (alpha / r) B A,  A (r, m)
drawn, B (n, r) zero at first, Q(W) fixed.  Trained to predict text in the paper, here to give the original's predictions on the calibration
text; what comes out, dense, lies near to what one bit a weight can hold, row by row, and takes the original's place when all is compressed
again.  In a recipe it stands under `restore`. Under `tune` what was held is revised to the codes nearest to W', which loses most of it.
It corrects whatever has codes (`core.packed.Coded`) and names no form.
Sibling: quantize.residual.lorc (the correction is stored)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Coded, Packed, Soft
from laconic.core.transform import Lesson, Objective
from laconic.kernels.losses import Divergence

CARD = Card(
    Paper("Zhao et al.", 2025, "arXiv:2502.13179", "section 3.4"),
    catalogue="ptq161",
    sibling="quantize.residual.lorc",
    exceptions={
        "a soft form computes what it stores": "the correction is dense, and what is stored is rounded again",
        "every parameter learns at once": "A moves nothing while B is zero, as in LoRA",
    },
)

KL = Divergence()


class Corrected(Soft):
    """A form of codes, and a low-rank correction. a (r, m), b (n, r)."""

    def __init__(self, coded: Coded, rank: int, alpha: float) -> None:
        super().__init__()
        self.shape, self.inner, self.factor = coded.shape, coded, alpha / rank
        n, m = coded.matrix
        rank, bound = min(rank, n, m), 1 / math.sqrt(max(m, 1))
        draw = torch.Generator().manual_seed(n * 65537 + m)
        self.a = nn.Parameter(torch.empty(rank, m).uniform_(-bound, bound, generator=draw))
        self.b = nn.Parameter(torch.zeros(n, rank))

    def correction(self) -> Tensor:
        """Of the form's shape."""
        return (self.factor * (self.b @ self.a)).reshape(self.shape)

    def dense(self) -> Tensor:
        return self.inner.dense() + self.correction()

    @torch.no_grad()
    def harden(self) -> Packed:
        """The form with the codes nearest to what it is with the correction; those of weights that were not moved stay."""
        wished, moved = (self.inner.groups(matrix.reshape(self.matrix)) for matrix in (self.dense(), self.correction()))
        kept = self.inner.harden().coded()
        index = moved.ne(0).any(1).nonzero()[:, 0]
        if kept is None or not len(index):
            return self.inner.harden()
        kept.exchange(index, kept.nearest(index, wished[index])[0])
        return kept.harden()


def corrected(held: Packed, target: Tensor, rank: int, alpha: float) -> Soft | None:
    """A form with codes, to be corrected; nothing else can be rounded again."""
    coded = held.coded()
    return None if coded is None else Corrected(coded, rank, alpha)


@dataclass(frozen=True)
class Restorative(Lesson):
    """Defaults: rank 64 and alpha 16, 10,000 steps of 2 sequences at a rate of 0.0001 that falls along a cosine, as in the authors' code.
    Numbers beside the codes (step, table) stay. Fewer steps want a higher rate."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("a", 1e-4), ("b", 1e-4), ("step", 0.0), ("table", 0.0))
    steps: int = 10_000
    batch: int = 2
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    narrow: ClassVar[bool] = True
    rank: int = 64
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: a correction has a rank of 1 or more")

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(corrected, rank=self.rank, alpha=self.alpha))
