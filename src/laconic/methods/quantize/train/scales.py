"""PTQ1.61's learned scales: of weights in signs only the factors learn, from what each block gives out; signs stay as they were set.

Zhao et al. 2025, arXiv:2502.13179, section 3.3:  W ~ (alpha s + mu) (r1 r2^T),  alpha (n, 1) beginning where it is held, r1 (n, 1) and
r2 (1, m) at one.  The objective is the mean squared error of a block's output plus -log of its cosine to what the original gives, counted
twice: the original on its own hidden states, and on those that the compressed model before it gives.  With r2 the rows of a matrix learn
together, where scales by formula are each row's own.  Salient columns, and forms of any other kind, stay as they are.
Sibling: quantize.round.lwc (ranges of groups learn, codes follow)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.losses import SquaredAndAngle
from laconic.methods.quantize.grid.signs import Factors, Signs

CARD = Card(
    Paper("Zhao et al.", 2025, "arXiv:2502.13179", "section 3.3"),
    catalogue="ptq161",
    sibling="quantize.round.lwc",
    exceptions={"weights of one sign teach every parameter": "a row whose weights are alike has no scale to learn"},
)


def soften(held: Packed, target: Tensor) -> Soft | None:
    """Signs by their factors; other codes beside them (salient columns) stay, since no rate is given for what they could learn."""
    return Factors(held) if isinstance(held, Signs) else held.coded()


BOTH = SquaredAndAngle()


@dataclass(frozen=True)
class Scales(Lesson):
    """Defaults: 20 passes over 128 calibration sequences, one a step, by Adam at constant rates of 0.0005 for alpha and 0.001 for r1 and
    r2, block by block, as in the authors' code. Fewer steps want higher rates."""

    objective: Objective = BOTH
    rates: tuple[tuple[str, float], ...] = (("scale", 5e-4), ("by_row", 1e-3), ("by_column", 1e-3), ("step", 0.0))
    steps: int = 20 * 128
    batch: int = 1
    decay: Literal["constant", "linear", "cosine"] = "constant"
    scope: Scope = BLOCK
    targets: Literal["float", "prefix", "both"] = "both"

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, soften)
