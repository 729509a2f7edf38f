"""Matryoshka representation learning: one embedding whose first numbers are embeddings of their own.

Kusupati et al. 2022 (NeurIPS), arXiv:2205.13147, section 3, eq. 1.  With nested sizes M = {8, 16, ..., d}:
    min over W  sum_{m in M} c_m loss(head_m(z[:m]), y),   z = W x,   c_m = 1,
head_m a matrix of its own, or the first m columns of one (MRL-E).  A loss on vectors themselves normalises each prefix; here, where vectors
are given and no labels, it is KL between the neighbourhoods that the given and the shorter ones see (`kernels.losses.Neighbours`).
forms: W (d, in) as Joined rows, piece i those that size i adds, and heads as Joined columns (MRL-E) or modules of their own.  Every step
goes down the losses of all sizes.  Nothing changes when the embedding is used, but z may be cut anywhere, between the sizes as well:
`laconic.kernels.retrieval` has the adaptive cascade and funnel retrieval of sections 4.2.1 and 4.3.1.
Sibling: nest.width.matformer (widths of hidden layers, one drawn a step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Dense, Packed, Soft
from laconic.core.transform import Lesson, Objective
from laconic.kernels.losses import Neighbours
from laconic.methods.nest.width.matformer import learnable

CARD = Card(Paper("Kusupati et al.", 2022, "arXiv:2205.13147", "section 3"), catalogue="mrl", sibling="nest.width.matformer")

NEIGHBOURS = Neighbours()


@dataclass(frozen=True)
class MRL(Lesson):
    """Defaults: 100 steps of 256 vectors, which given vectors of hundreds of rows bear. What is held in codes learns them too."""

    objective: Objective = NEIGHBOURS
    rates: tuple[tuple[str, float], ...] = (("weight", 3e-4), ("bias", 3e-4), ("position", 5e-3), ("step", 3e-3))
    steps: int = 100
    batch: int = 256
    decay: Literal["constant", "linear", "cosine"] = "cosine"

    def prefixes(self, parts: int, generator: torch.Generator) -> Sequence[int]:
        return range(1, parts + 1)

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return learnable(held, target) if isinstance(held, Dense) else held.soften(target, learnable)
