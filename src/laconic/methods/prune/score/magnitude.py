"""Magnitude: a weight matters as much as it is large.

Han et al. 2015, arXiv:1506.02626, section 3: score[n, m] = |W[n, m]|.  weight (n, m) -> score (n, m), higher = keep.  No data.
Sibling: prune.score.wanda (times the input's norm)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.score import Score, Unit
from laconic.core.statistic import Statistic

CARD = Card(Paper("Han et al.", 2015, "arXiv:1506.02626", "section 3"), catalogue="", sibling="prune.score.wanda")


def magnitude(weight: Tensor) -> Tensor:
    """weight (n, m) -> score (n, m)."""
    return weight.abs()


@dataclass(frozen=True)
class Magnitude(Score):
    """|W|."""

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        return magnitude(unit.weight)
