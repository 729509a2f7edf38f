"""FireQ's cache: keys and values in 4 bits with a scale a token and head, the loudest key channels scaled once positions have turned them.

Baek et al. 2025, arXiv:2505.20839, with the constants of the authors' code:  Q(x) = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1),
s = max |x| / (2^(b-1) - 1) of each `group` channels of a token.  Before that key channel j is multiplied by f_j, and the query that meets
it divided by it: of the `top_k` channels of a head with the largest |k_j| over some tokens, no two of a pair, and of those that they are
turned with, f_j = beta times the largest of the others / max_t |k_j|, else 1.  So what a factor before the turn, which has to be one for
both channels of a pair (quantize.smooth.fireq), leaves behind is gone.  Factors are d numbers a head, known from the model and not counted
among the cache's bytes; they are found from keys of drawn tokens unless given.
The authors' kernel takes queries in fp8; here they stay as they come.  keys (b, h, t, d), values (b, h, t, e), any dtype.
Stored: codes of b bits in bytes, scales in bf16. Bits a number: b + 16 / group, or b + 16 / d for shorter heads. A new token is read as it
is by itself.  Sibling: cache.store.kivi (ranges of blocks of tokens, no factors)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.state import Peaked, Ragged, State, stretched
from laconic.kernels.attention import Grouped, Part, Plain, held_attention
from laconic.kernels.tokenwise import Kept, joined, parts, read

CARD = Card(Paper("Baek et al.", 2025, "arXiv:2505.20839"), catalogue="fireq", sibling="cache.store.kivi")

# the least size of a channel, as a share of the greatest
FLOOR = 2.0**-12


def quantize(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """x (..., d) in groups along the last axis, the last perhaps shorter -> codes + 2^(bits - 1), (..., d) uint8, and scales (..., g)
    bf16."""
    d, most = x.shape[-1], 2 ** (bits - 1) - 1
    group = min(group, d)
    runs = F.pad(x.float(), (0, -d % group)).unflatten(-1, (-1, group))
    scale = (runs.abs().amax(-1) / most).bfloat16()
    # of zeros every code is that of zero
    step = torch.where(scale > 0, scale.float(), torch.inf)
    codes = (runs / step[..., None]).round_().clamp_(-most - 1, most).add_(most + 1)
    return codes.flatten(-2)[..., :d].to(torch.uint8), scale


def followed(sizes: Tensor, pairs: int, top_k: int, beta: float) -> Tensor:
    """Largest sizes of key channels (k, d) after the turn, of which i and i + pairs are turned together -> factors (k, d)."""
    alone = torch.cat([torch.maximum(sizes[:, :pairs], sizes[:, pairs : 2 * pairs]), sizes[:, 2 * pairs :]], 1)
    loudest = torch.zeros_like(alone, dtype=torch.bool).scatter(1, alone.topk(min(top_k, alone.shape[1]), 1).indices, True)
    chosen = torch.cat([loudest[:, :pairs], loudest[:, :pairs], loudest[:, pairs:]], 1)
    level = sizes.masked_fill(chosen, 0.0).amax(1, keepdim=True)
    # a head of which all are chosen goes to the least of them
    level = torch.where(level > 0, level, sizes.amin(1, keepdim=True))
    least = (FLOOR * sizes.amax(1, keepdim=True)).clamp(min=2.0**-100)
    factors = beta * level.clamp(min=least) / sizes.clamp(min=least)
    return torch.where(chosen & (sizes > least), factors, torch.ones_like(factors))


@dataclass(eq=False)
class FireQ(State):
    """bits 2 to 8; group: channels that share a scale; top_k: of the loudest key channels of a head, beta: to what they are scaled.
    factors: of each layer, (k, d); found by `fitted` where there are none and top_k is not 0."""

    bits: int = 4
    group: int = 128
    top_k: int = 3
    beta: float = 1.0
    factors: Mapping[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: codes have 2 to 8 bits; the paper's have 4")
        if self.group < 1:
            raise ValueError(f"group={self.group}: a group has at least one number")
        if self.top_k < 0 or not self.beta > 0:
            raise ValueError(f"top_k={self.top_k}, beta={self.beta}: 0 channels or more are scaled, to something above 0")

    def fitted(self, loudness: Iterator[Tensor | None], peaked: Peaked | None = None) -> Self:
        if not self.top_k or self.factors or peaked is None:
            return self
        found = {layer: followed(*one, self.top_k, self.beta) for layer, one in enumerate(peaked()) if one is not None}
        return replace(self, factors=found)

    def stretch(self, layer: int) -> Tensor | None:
        return self.factors.get(layer)

    def keep(self, kept: Kept | None, new: tuple[Ragged, ...]) -> Kept:
        return joined(kept, new, lambda x: quantize(x, self.bits, self.group), self.bits, "scales")

    def read(self, kept: Kept | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
        return read(self._held, kept, staged)

    def attend(self, query: Tensor, layer: int, mask: Tensor | None, scale: float | None = None) -> Tensor:
        had, by = self.layers[layer], self.stretch(layer)
        halves: tuple[list[Part], list[Part]] = ([], [])
        for at, half in enumerate(halves):
            half += [self._held(had.kept, at)] if had.kept else []
            for one in had.staged[at : at + 1]:
                pages = one.pages if by is None or at else [stretched(page, by).to(page.dtype) for page in one.pages]
                half += [Plain(tuple(pages), one.lengths)]
        return held_attention(query if by is None else stretched(query, 1 / by).to(query.dtype), *halves, mask, scale)

    def _held(self, kept: Kept, at: int) -> Grouped:
        """The codes of a half as the kernels read them: the middle of the codes is a zero."""
        codes, scales, width = parts(kept, at, "scales")
        zeros = tuple(page * -(2.0 ** (self.bits - 1)) for page in scales.pages)
        return Grouped(codes.pages, scales.pages, zeros, codes.lengths, self.bits, min(self.group, width), False, width)
