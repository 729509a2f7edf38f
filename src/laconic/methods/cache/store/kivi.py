"""KIVI: keys quantized per channel, values per token, the newest tokens not at all.

Liu et al. 2024, arXiv:2402.02750, section 3 and algorithm 1.  Q(x) = round((x - z) / s), x' = Q(x) s + z, with z = min x and
s = (max x - min x) / (2^b - 1) of each group: for keys `group` tokens of one channel, since outliers sit in few channels; for values
`group` channels of one token, since attention mixes few tokens.  A group of tokens needs them all, so keys wait in full precision until
`residual` of them are there and are quantized as a block; values wait as long, then leave one by one.  What is appended is read exactly, in
a prefill and at each step, and quantized when it is committed.  keys (b, h, t, d), values (b, h, t, e), any dtype.
Stored: codes of b bits packed in bytes; s and z in the 16-bit dtype of the tokens, else in bf16; the residual as it came. Bits a number:
b + 32 / group, besides the residual.  keys = values = "token" is the paper's baseline, round to nearest per token.
Sibling: cache.store.full (every token as it is)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.state import Ragged, State
from laconic.kernels.attention import Grouped, Part, Plain, held_attention
from laconic.kernels.bits import pack

CARD = Card(Paper("Liu et al.", 2024, "arXiv:2402.02750", "section 3"), catalogue="kivi", sibling="cache.store.full")

Axis = Literal["channel", "token"]


def quantize(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., m) in groups along the last axis, the last perhaps shorter -> codes (..., m) uint8, s and z (..., g) as they are stored."""
    stored = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    runs = [run.float() for run in x.split(group, -1)]
    low = torch.stack([run.amin(-1) for run in runs], -1).to(stored)
    high = torch.stack([run.amax(-1) for run in runs], -1)
    scale = ((high - low.float()).clamp(min=0) / (2**bits - 1)).to(stored)
    # equal numbers have no range: all of them are z
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    codes = [((run - low[..., i, None].float()) / step[..., i, None]).round_().clamp_(0, 2**bits - 1) for i, run in enumerate(runs)]
    return torch.cat(codes, -1).to(torch.uint8), scale, low


@dataclass(eq=False)
class Kivi(State):
    """bits 1 to 8; group: numbers that share a scale; residual: newest tokens in full precision, a multiple of group where tokens are
    grouped; keys, values: one scale for a group of tokens of a "channel", or for a group of channels of a "token"."""

    bits: int = 2
    group: int = 32
    residual: int = 128
    keys: Axis = "channel"
    values: Axis = "token"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: codes have 1 to 8 bits; the paper's are 2 and 4")
        if self.group < 1:
            raise ValueError(f"group={self.group}: a group has at least one number")
        if self.residual < 0:
            raise ValueError(f"residual={self.residual}: give the newest tokens that stay as they are, 0 or more")
        for name, axis in self.halves:
            if axis not in ("channel", "token"):
                raise ValueError(f'{name}="{axis}": the axes are "channel" and "token"')
            if axis == "channel" and (self.residual == 0 or self.residual % self.group):
                raise ValueError(f"residual={self.residual}: groups of {self.group} tokens need a residual of a multiple of {self.group}")

    @property
    def halves(self) -> tuple[tuple[str, Axis], ...]:
        """Names and axes, in the order of what is appended."""
        return ("keys", self.keys), ("values", self.values)

    def keep(self, kept: Mapping[str, Ragged] | None, new: tuple[Ragged, ...]) -> Mapping[str, Ragged]:
        found: dict[str, Ragged] = {}
        for (name, axis), fresh in zip(self.halves, new, strict=True):
            had = {} if kept is None else {part: one for part, one in kept.items() if part.startswith(f"{name}.")}
            recent = had.pop(f"{name}.recent").join(fresh) if had else fresh
            # keys leave the residual when it is full, values when a newer one comes
            leave = tuple(n - n % self.residual if axis == "channel" else max(0, n - self.residual) for n in recent.lengths)
            found |= had | {f"{name}.recent": recent.cut(leave, recent.lengths)}
            if any(leave):
                for part, one in self._packed(recent.cut((0,) * len(leave), leave), axis).items():
                    found[f"{name}.{part}"] = had[f"{name}.{part}"].join(one) if had else one
        return found

    def _packed(self, x: Ragged, axis: Axis) -> dict[str, Ragged]:
        """Codes (b, h, n, r, bytes), scales and zeros (b, h, n, r, g): n tokens of r = 1 row each, or n groups of tokens of r = d rows."""
        b, h, t, d = x.data.shape
        unit = self.group if axis == "channel" else 1
        rows = x.data.reshape(b, h, t // unit, unit, d)
        codes, scale, zero = quantize(rows.transpose(-1, -2) if axis == "channel" else rows, self.bits, self.group)
        # the kernel makes its tensors where the codes are
        with codes.device:
            stored = pack(codes.reshape(-1, codes.shape[-1]), self.bits).reshape(*codes.shape[:-1], -1)
        lengths = tuple(n // unit for n in x.lengths)
        # in rows that are shorter than the others, what follows their end goes
        start = (0,) * b
        return {name: Ragged((one,), lengths).cut(start, lengths) for name, one in (("codes", stored), ("scales", scale), ("zeros", zero))}

    def _held(self, kept: Mapping[str, Ragged] | None, at: int) -> Grouped | None:
        """The codes of a half, as the kernels read them."""
        name, axis = self.halves[at]
        if kept is None or f"{name}.codes" not in kept:
            return None
        codes, scales, zeros = (kept[f"{name}.{part}"] for part in ("codes", "scales", "zeros"))
        width = kept[f"{name}.recent"].pages[0].shape[3]
        return Grouped(codes.pages, scales.pages, zeros.pages, codes.lengths, self.bits, self.group, axis == "channel", width)

    def read(self, kept: Mapping[str, Ragged] | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
        if kept is None:
            return staged
        found = []
        for at, (name, _) in enumerate(self.halves):
            parts, held = [kept[f"{name}.recent"], *staged[at : at + 1]], self._held(kept, at)
            if held is not None:
                parts.insert(0, Ragged((held.dense().to(parts[0].pages[0].dtype),), held.tokens))
            found.append(parts[0].join(*parts[1:]))
        return tuple(found)

    def attend(self, query: Tensor, layer: int, mask: Tensor | None, scale: float | None = None) -> Tensor:
        had = self.layers[layer]
        halves: tuple[list[Part], list[Part]] = ([], [])
        for at, (half, (name, _)) in enumerate(zip(halves, self.halves, strict=True)):
            held, rest = self._held(had.kept, at), [*([had.kept[f"{name}.recent"]] if had.kept else []), *had.staged[at : at + 1]]
            half += [*([held] if held else []), *(Plain(one.pages, one.lengths) for one in rest)]
        return held_attention(query, *halves, mask, scale)
