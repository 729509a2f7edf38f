"""Block floating point with sorted key channels (K-sort): a short mantissa a number, one exponent a block, loud channels beside loud ones.

Trukhanov and Soloveychik 2024, arXiv:2403.20137: a block of channels of one token shares the exponent of its greatest entry,
s = floor(log2 max |x|) - (b - 2), and x' = 2^s clamp(round(x / 2^s)) with b-bit signed mantissas, so one loud entry costs the others their
bits. Loud key channels stay where they are, token after token, so in each head they are sorted by the norm of the rows of the key
projection that make them, the two of a rotary pair side by side, before they are cut into blocks; queries are sorted alike, and no score
changes.  keys (b, h, t, d), values (b, h, t, e), any dtype; values lie in blocks as they come.
The paper sorts the rows of the weights and the tables of the rotary embedding beforehand. Here weights stay, and the state sorts keys as
they come and queries as they attend, which are the same numbers: an order is d small numbers a head, known from the weights and not
counted among the cache's bytes.
Stored: mantissas of b bits in bytes, the exponent of a step in a byte for each block. Bits a number: b + 8 / block. A new token is read as
it is by itself.  Sibling: cache.store.kivi (scales and zeros of blocks of tokens)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.state import Peaked, Ragged, State, reordered
from laconic.kernels.attention import Grouped, Part, Plain, held_attention
from laconic.kernels.tokenwise import Kept, joined, parts, read

CARD = Card(Paper("Trukhanov and Soloveychik", 2024, "arXiv:2403.20137"), catalogue="k-sort-bfp", sibling="cache.store.kivi")


def quantize(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """x (..., d) in blocks along the last axis, the last perhaps shorter -> mantissas + 2^(bits - 1), (..., d) uint8, and exponents of
    the steps + 127, (..., g) uint8."""
    d = x.shape[-1]
    runs = F.pad(x.float(), (0, -d % block)).unflatten(-1, (-1, block))
    # the greatest is below 2^exponent and no less than half of it; -2^(bits - 1) steps must be a number too
    step = (torch.frexp(runs.abs().amax(-1)).exponent - (bits - 1)).clamp(-126, 128 - bits)
    most = 2 ** (bits - 1) - 1
    codes = torch.ldexp(runs, -step[..., None]).round_().clamp_(-most, most).add_(most + 1)
    return codes.flatten(-2)[..., :d].to(torch.uint8), (step + 127).to(torch.uint8)


def by_loudness(loud: Tensor) -> Tensor:
    """loud (k, d) -> order (k, d): the loudest channel of each head first; equal ones, as of a rotary pair, stay side by side."""
    return loud.argsort(dim=-1, descending=True, stable=True)


@dataclass(eq=False)
class Bfp(State):
    """bits 2 to 8 of a mantissa, its sign included; block: channels that share an exponent; sort: whether key channels are sorted where
    the model's weights say how loud they are. orders: of each layer, (k, d), otherwise as they come; found by `fitted` where sort is on."""

    bits: int = 4
    block: int = 32
    sort: bool = True
    orders: Mapping[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: a mantissa has 2 to 8 bits, its sign included")
        if self.block < 1:
            raise ValueError(f"block={self.block}: a block has at least one number")

    def fitted(self, loudness: Iterator[Tensor | None], peaked: Peaked | None = None) -> Self:
        if not self.sort:
            return self
        return replace(self, orders={layer: by_loudness(loud) for layer, loud in enumerate(loudness) if loud is not None})

    def order(self, layer: int) -> Tensor | None:
        return self.orders.get(layer)

    def keep(self, kept: Kept | None, new: tuple[Ragged, ...]) -> Kept:
        return joined(kept, new, lambda x: quantize(x, self.bits, self.block), self.bits, "exponents")

    def read(self, kept: Kept | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
        return read(self._held, kept, staged)

    def attend(self, query: Tensor, layer: int, mask: Tensor | None, scale: float | None = None) -> Tensor:
        had, order = self.layers[layer], self.order(layer)
        halves: tuple[list[Part], list[Part]] = ([], [])
        for at, half in enumerate(halves):
            half += [self._held(had.kept, at)] if had.kept else []
            half += [Plain(one.pages, one.lengths) for one in had.staged[at : at + 1]]
        return held_attention(query if order is None else reordered(query, order), *halves, mask, scale)

    def _held(self, kept: Kept, at: int) -> Grouped:
        """The codes of a half as the kernels read them: a step is a scale, and the middle of the codes a zero."""
        codes, exponents, width = parts(kept, at, "exponents")
        # a power of two is its exponent's bits
        scales = tuple(page.to(torch.int32).bitwise_left_shift(23).view(torch.float32).bfloat16() for page in exponents.pages)
        zeros = tuple(page * -(2.0 ** (self.bits - 1)) for page in scales)
        return Grouped(codes.pages, scales, zeros, codes.lengths, self.bits, self.block, False, width)
