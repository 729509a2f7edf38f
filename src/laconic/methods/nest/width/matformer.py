"""MatFormer: feed-forward blocks of several widths, each the first neurons of the next, all learned together in the same weights.

Devvrit et al. 2024 (NeurIPS), arXiv:2310.07707, sections 3.1 and 3.2.  Granularity i of g has the first m_i hidden neurons of every block,
m_1 < ... < m_g:  T_i(x) = act(x W_in[:m_i]^T) W_out[:m_i].  A step draws one i, with the same odds or those given, uses it in all layers
and goes down the loss of that model ("one", what the paper trains with), or the losses of all ("all").  Attention, embeddings and norms
are common and learn with every granularity.  Any prefix is a model, and so is any choice of a granularity for each layer, though none of
those was trained (Mix'n'Match, section 3.3: nest.order.mixnmatch).
The paper trains from scratch; over a trained model whose neurons are in order of worth the same rule begins where truncating leaves off,
and the loss is KL to the original's predictions.  What is held in codes learns as in quantize.train.straight.
forms: Joined pieces, piece i the neurons that granularity i adds, and what is kept as it is.  Memory: four fp32 numbers a weight.
Sibling: quantize.train.straight (one size, codes and steps)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Dense, Packed, Soft
from laconic.core.transform import Lesson, Objective
from laconic.kernels.losses import Divergence

CARD = Card(Paper("Devvrit et al.", 2024, "arXiv:2310.07707", "section 3"), catalogue="matformer", sibling="quantize.train.straight")

KL = Divergence()


class Numbers(Soft):
    """A tensor's own numbers, learned: computed with as they will be stored, gradients pass the rounding."""

    def __init__(self, held: Dense) -> None:
        super().__init__()
        self.shape, self.stored = held.shape, held.value.dtype
        self.weight = nn.Parameter(held.value.float().clone())

    def dense(self) -> Tensor:
        return self.weight + (self.weight.to(self.stored).float() - self.weight).detach()

    def harden(self) -> Dense:
        return Dense(self.weight.detach().to(self.stored))


def learnable(held: Packed, target: Tensor) -> Soft | None:
    """Numbers as they are, codes in their own way."""
    return Numbers(held) if isinstance(held, Dense) else held.soften(target)


def drawn(parts: int, odds: Sequence[float], generator: torch.Generator) -> int:
    """A granularity, 1 to parts, with these odds; evenly where there are none."""
    weights = torch.tensor(odds) if odds else torch.ones(parts)
    return 1 + int(torch.multinomial(weights, 1, generator=generator))


@dataclass(frozen=True)
class MatFormer(Lesson):
    """draw: one granularity a step, or all of them; odds of each of them to be drawn, evenly where there are none."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("weight", 1e-3), ("position", 5e-3), ("step", 3e-3))
    steps: int = 128
    batch: int = 4
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    draw: Literal["one", "all"] = "one"
    odds: tuple[float, ...] = ()

    entire = True

    def __post_init__(self) -> None:
        if any(share < 0 for share in self.odds) or (self.odds and not sum(self.odds)):
            raise ValueError(f"odds={self.odds}: give each granularity a number of 0 or more, and one of them more than 0")

    def prefixes(self, parts: int, generator: torch.Generator) -> Sequence[int]:
        if self.odds and len(self.odds) != parts:
            raise ValueError(f"odds for {len(self.odds)} granularities where there are {parts}")
        return range(1, parts + 1) if self.draw == "all" else (drawn(parts, self.odds, generator),)

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return learnable(held, target) if isinstance(held, Dense) else held.soften(target, learnable)
