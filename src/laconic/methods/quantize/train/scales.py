"""PTQ1.61's learned scales: codes and signs stay as they were set, the numbers beside them learn from what each block gives out.

Zhao et al. 2025, arXiv:2502.13179, section 3.3:  W ~ (alpha s + mu) (r1 r2^T),  alpha (n, 1) beginning where it is held, r1 (n, 1) and
r2 (1, m) at one.  The objective is the mean squared error of a block's output plus -log of its cosine to what the original gives, counted
twice: the original on its own hidden states, and on those that the compressed model before it gives.  With r2 the rows of a matrix learn
together, where scales by formula are each row's own.  In the paper the scales of salient columns stay; here whatever has codes learns the
numbers beside them: scales of groups (and of salient columns), tables of vectors.
Sibling: quantize.round.lwc (ranges of groups learn, codes follow)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.angle import SquaredAndAngle

CARD = Card(Paper("Zhao et al.", 2025, "arXiv:2502.13179", "section 3.3"), catalogue="ptq161", sibling="quantize.round.lwc")

BOTH = SquaredAndAngle()


def coded(held: Packed, target: Tensor) -> Soft | None:
    """Codes that stay, and numbers that learn."""
    return held.coded()


@dataclass(frozen=True)
class Scales(Lesson):
    """Defaults: 20 passes over 128 calibration sequences, one a step, by Adam at constant rates, block by block, as in the authors' code; a
    rate of 0.001 for step, in logarithms (theirs, of alpha itself, is 0.0005), and for table, in sizes of its entries. Fewer steps want
    higher rates."""

    objective: Objective = BOTH
    rates: tuple[tuple[str, float], ...] = (("step", 1e-3), ("table", 1e-3))
    steps: int = 20 * 128
    batch: int = 1
    decay: Literal["constant", "linear", "cosine"] = "constant"
    scope: Scope = BLOCK
    targets: Literal["float", "prefix", "both"] = "both"

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, coded)
