"""Wanda: weight magnitude times the norm of the input that it multiplies.

Sun et al. 2023, arXiv:2306.11695, eq. 1: score[n, m] = |W[n, m]| * ||x_m||, here with the root mean square over tokens, which
ranks alike; compared within a row (section 3).  weight (n, m), gram (m, m) = mean of x xT -> score (n, m), higher = keep.
Sibling: prune.score.magnitude (no input norm)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.score import Score, Unit
from laconic.core.statistic import Gram, Statistic

CARD = Card(Paper("Sun et al.", 2023, "arXiv:2306.11695", "section 3, eq. 1"), catalogue="", sibling="prune.score.magnitude")


def wanda(weight: Tensor, gram: Tensor) -> Tensor:
    """weight (n, m), gram (m, m) or, of a convolution with groups, (g, m, m) -> score (n, m)."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().reshape(-1, weight.shape[1])
    return weight.abs() * norm.repeat_interleave(weight.shape[0] // norm.shape[0], 0)


@dataclass(frozen=True)
class Wanda(Score):
    """|W| times the root mean square of its input."""

    wants = (Gram(),)

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        return wanda(unit.weight, stats[Gram()])
