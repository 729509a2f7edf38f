"""Mix'n'Match: sizes that change as little as they can from layer to layer, and in one direction over depth.

Devvrit et al. 2024 (MatFormer), arXiv:2310.07707, section 3.3: of all choices of a granularity for each layer, the best have neighbouring
layers of equal or neighbouring granularity, growing with depth.  So every layer gets its next slice before any gets the one after, and
within a round the last layer is first: each prefix has at most two granularities, and sizes that never fall over depth.
parts -> names; nothing is measured.  `deep=False`: the first layer is first, sizes never rise.
Sibling: nest.order.rounds (within a round what helps most is first, wherever it lies)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from laconic.core.claim import Card, Paper
from laconic.core.menu import Order, Trial

CARD = Card(Paper("Devvrit et al.", 2024, "arXiv:2310.07707", "section 3.3"), catalogue="matformer", sibling="nest.order.rounds")


@dataclass(frozen=True)
class MixNMatch(Order):
    """deep: whether the last layers widen first. Names come in the order of the layers."""

    deep: bool = True

    def __call__(self, parts: Mapping[str, Sequence[int]], trial: Trial) -> Sequence[str]:
        names = list(parts)[:: -1 if self.deep else 1]
        return [name for have in range(1, max(map(len, parts.values()), default=1)) for name in names if len(parts[name]) > have]
