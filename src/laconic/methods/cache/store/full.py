"""The full cache: keys and values of all tokens as they are, the reference that other caches are compared with.

Shazeer 2019, arXiv:1911.02150, section 2.4: K_t = [K_t-1; k_t], V_t = [V_t-1; v_t], o_t = softmax(q_t K_tT / sqrt(d)) V_t, so that a new
token costs one step of attention and nothing is computed twice.  keys (b, h, t, d), values (b, h, t, e), any dtype; 16 or 32 bits a number.
Sibling: cache.store.kivi (2 or 4 bits)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.state import Ragged, State
from laconic.kernels.attention import Plain, held_attention
from laconic.kernels.tokenwise import HALVES

CARD = Card(Paper("Shazeer", 2019, "arXiv:1911.02150", "section 2.4"), catalogue="", sibling="cache.store.kivi")


@dataclass(eq=False)
class Full(State):
    """Every token in full precision."""

    steady: ClassVar[bool] = True

    def keep(self, kept: Mapping[str, Ragged] | None, new: tuple[Ragged, ...]) -> Mapping[str, Ragged]:
        if kept is None:
            return {name: one.cut((0,) * len(one.lengths), one.lengths) for name, one in zip(HALVES, new, strict=True)}
        return {name: kept[name].join(one) for name, one in zip(HALVES, new, strict=True)}

    def read(self, kept: Mapping[str, Ragged] | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
        if kept is None:
            return staged
        return tuple(kept[name].join(one) for name, one in zip(HALVES, staged, strict=True)) if staged else tuple(kept.values())

    def attend(self, query: Tensor, layer: int, mask: Tensor | None, scale: float | None = None) -> Tensor:
        had = self.layers[layer]
        rows = [[one for one in ((had.kept or {}).get(name), *had.staged[at : at + 1]) if one] for at, name in enumerate(HALVES)]
        keys, values = ([Plain(one.pages, one.lengths) for one in half] for half in rows)
        return held_attention(query, keys, values, mask, scale)
