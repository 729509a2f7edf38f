"""LR2VQ's learning: low-rank vectors first, then their clusters, soft at the start and hard at the end, over the whole model.

Zhu et al. 2022, arXiv:2211.11397, with differentiable k-means (Cho et al. 2022, DKM, arXiv:2108.12659, section 3):
first share `warm` of the steps: W = L B, both learned, nothing rounded; then k-means of L anew, and
W = A C B,  A = softmax(-|L_i - C_j|^2 / t) over entries j,  t falling from heat[0] to heat[1] mean squared distances, so that at the end
each vector is one entry. L, C and B learn together; the objective is KL from the original's predictions, the paper's the task's loss.
Without a basis it is differentiable k-means of the vectors themselves.  Other forms learn in their own way.
Memory: a weight for each vector and entry, and four fp32 numbers for each number of L.
Sibling: quantize.train.straight (entries from the first step on, gradients passed from them to the positions)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import Lesson, Objective
from laconic.kernels.losses import Divergence
from laconic.methods.quantize.grid.spans import Moving, Spanned

CARD = Card(
    Paper("Zhu et al.", 2022, "arXiv:2211.11397"),
    catalogue="lr2vq",
    sibling="quantize.train.straight",
    exceptions={"a soft form computes what it stores": "vectors are mixtures of entries until they have cooled down"},
)

KL = Divergence()


def softly(held: Packed, target: Tensor, warm: float, heat: tuple[float, float]) -> Soft | None:
    """A form of named vectors as mixtures; any other in its own way."""
    return Moving(held, target, warm, heat) if isinstance(held, Spanned) else held.soften(target)


@dataclass(frozen=True)
class Annealed(Lesson):
    """warm: share of the steps without entries; heat: t at the begin and the end of the others. Rates: position and table in sizes of the
    table, basis in sizes of its own, step (of forms with scales) in logarithms."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("position", 1e-2), ("table", 1e-2), ("basis", 1e-2), ("step", 3e-3))
    steps: int = 128
    batch: int = 4
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warm: float = 0.25
    heat: tuple[float, float] = (1.0, 0.01)

    def __post_init__(self) -> None:
        if not 0 <= self.warm < 1:
            raise ValueError(f"warm={self.warm}: a share of the steps, below 1")
        if not self.heat[0] >= self.heat[1] > 0:
            raise ValueError(f"heat={self.heat}: from a number down to another, above 0")

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(softly, warm=self.warm, heat=self.heat))
