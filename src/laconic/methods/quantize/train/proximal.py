"""JLCM's joint learning: codebooks and which entry each weight has, from what a block gives out, codes moving to neighbours alone.

Yvinec et al. 2023, arXiv:2309.17361, section 3.2 and 3.3:  position (n, m) in levels, w = table[round(position)], the rounding passed by
the gradient. Straight through to the weight itself, a step may carry a weight to any entry, the extremes most of all; here its gradient is
that of the line to the one neighbour that the step would make for, and a step moves a code by one at most. Entries have their ordinary
gradient, the sum over the weights that hold them. The objective is the squared error of a block's output, on inputs that the compressed
model before it gives.  Other forms learn in their own way.
Sibling: quantize.train.straight (the whole model at once)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from laconic.core.claim import Card, Paper
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.losses import SquaredError

CARD = Card(
    Paper("Yvinec et al.", 2023, "arXiv:2309.17361", "section 3.2, 3.3"),
    catalogue="jlcm",
    sibling="quantize.train.straight",
)

ERROR = SquaredError()


@dataclass(frozen=True)
class Proximal(Lesson):
    """Defaults: 400 steps of 4 sequences by Adam, falling along a cosine, block by block; position in levels, table in sizes of its
    entries, step (of forms with scales) in logarithms."""

    objective: Objective = ERROR
    rates: tuple[tuple[str, float], ...] = (("position", 1e-2), ("table", 3e-3), ("step", 3e-3))
    steps: int = 400
    batch: int = 4
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    scope: Scope = BLOCK
