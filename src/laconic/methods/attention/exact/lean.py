"""LeanAttention: the tiles of all heads and rows in one line, cut into equal shares.

Sanovar et al. 2024, arXiv:2405.10480, section 4.  The context of each pair of a row and a head is cut into tiles; worker w of W takes
tiles floor(T w / W) to floor(T (w + 1) / W) of the line of all T tiles, wherever a pair ends. Of each pair it gives what is not yet
divided, m = max s, l = sum exp(s - m), o = sum exp(s - m) v, and those of a pair are joined exactly (section 3):
m = max(m1, m2), l = e^(m1 - m) l1 + e^(m2 - m) l2, o = e^(m1 - m) o1 + e^(m2 - m) o2, at last o / l.
tiles: how many each pair has (any of them may be 0); nobody has more than ceil(T / W). It is how `laconic.cache` attends, so nothing needs
to ask for it; shares of other kinds are for comparison. Sibling: cache.store.full (what is attended over)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laconic.core.claim import Card, Paper
from laconic.core.state import Run, Schedule
from laconic.kernels.attention import lean

CARD = Card(Paper("Sanovar et al.", 2024, "arXiv:2405.10480", "section 4"), catalogue="lean-attention", sibling="cache.store.full")


@dataclass(frozen=True)
class Lean(Schedule):
    """Equal shares, whatever the pairs are."""

    def __call__(self, tiles: Sequence[int], workers: int) -> list[Run]:
        return lean(tiles, workers)
