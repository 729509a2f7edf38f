"""Rounds: every matrix gets its next part before any gets the one after; within a round, what helps most when it comes alone is first.

Wang et al. 2024 (BitStack), arXiv:2410.23918, section 3.3: in round i, with i parts of every matrix, the model is measured with one part
more of a single matrix, for each in turn; the round is sorted by what was measured, rounds follow one another.
parts, trial -> names.  The paper measures perplexity on a small calibration set; here it is KL to the original on search data, which a
classifier has too.  One measurement for each part but the first ones: (parts - 1) for each matrix.
Sibling: search.allocate.knapsack (one size, from predicted damages)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from laconic.core.claim import Card, Paper
from laconic.core.menu import Order, Trial

CARD = Card(Paper("Wang et al.", 2024, "arXiv:2410.23918", "section 3.3"), catalogue="", sibling="search.allocate.knapsack")


@dataclass(frozen=True)
class Rounds(Order):
    """No knobs."""

    def __call__(self, parts: Mapping[str, Sequence[int]], trial: Trial) -> Sequence[str]:
        order: list[str] = []
        for have in range(1, max(map(len, parts.values()), default=1)):
            counts = {name: min(have, len(sizes)) for name, sizes in parts.items()}
            names = [name for name, sizes in parts.items() if len(sizes) > have]
            damages = {name: found.value for name, found in zip(names, trial(counts, names), strict=True)}
            order += sorted(names, key=lambda name: damages[name])
        return order
