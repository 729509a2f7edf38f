"""Codes of uneven levels: b-bit codes packed densely by row that name values of a table, and one scale for each group of a row.

The table is a float format (fp4, fp6, fp8, as MXFP4 and NVFP4 have them) or a codebook that is stored with the matrix.
Stored: codes (n, ceil(m b / 8)) uint8; scales (n, g) bf16, or uint8 where they are powers of two (e8m0) or floats (e4m3); `whole` (1,) fp32
beside scales in e4m3; table (2^b,) bf16 for a codebook. w = table[code] * scale [* whole].
Bits per weight: b + 16 / group, or b + 8 / group, and 16 * 2^b (codebook) or 32 (e4m3) once a matrix. A last group that the row does not
fill is legal and counted. Sibling: quantize.grid.grouped (even steps, with zeros)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.packed import Coded, Packed, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import grouped, through, ungrouped
from laconic.kernels.levels import Levels, decode, encode, ranked, ratios, rounded_scale, scales_of, stored_scales
from laconic.kernels.lookup import lookup_dense, lookup_linear


class Leveled(Packed):
    """A matrix view of `shape` on Levels."""

    form = "quantize.grid.levels.Leveled"
    codes: Tensor
    scales: Tensor

    def __init__(
        self, shape: tuple[int, ...], levels: Levels, codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None
    ) -> None:
        super().__init__()
        self.shape, self.levels = tuple(shape), levels
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        # those that are not there are not stored
        self.register_buffer("whole", whole)
        self.register_buffer("table", table)

    whole: Tensor | None
    table: Tensor | None

    @classmethod
    def of(cls, shape: tuple[int, ...], levels: Levels, codes: Tensor, scale: Tensor, whole: Tensor | None, table: Tensor | None) -> Self:
        """From plain codes (n, m) uint8 and scales (n, g) fp32 that can be stored as they are."""
        return cls(shape, levels, pack(codes, levels.bits), stored_scales(scale, levels, whole), whole, table)

    @staticmethod
    def bytes_of(n: int, m: int, levels: Levels) -> int:
        """Stored bytes of an (n, m) matrix."""
        scales = n * levels.count(m) * (2 if levels.scales == "bf16" else 1) + (4 if levels.scales == "e4m3" else 0)
        return n * packed_width(m, levels.bits) + scales + (2 * 2**levels.bits if levels.table == "codebook" else 0)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Codes (n, m) uint8 and scales (n, g) fp32."""
        return unpack(self.codes, self.levels.bits, self.matrix[1]), scales_of(self.scales, self.levels, self.whole)

    def rows(self, index: Tensor | slice) -> Tensor:
        return lookup_dense(self.codes[index], self.scales[index], self.whole, self.table, self.levels, self.matrix[1])

    def matmul(self, x: Tensor) -> Tensor:
        return lookup_linear(x, self.codes, self.scales, self.whole, self.table, self.levels)

    def dense(self) -> Tensor:
        return self.rows(slice(None)).reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return Ranked(self, target) if way is None else way(self, target)

    def coded(self) -> Coded:
        return Scaling(self)

    def describe(self) -> dict[str, Any]:
        levels = self.levels
        found = {"form": self.form, "shape": list(self.shape), "bits": levels.bits, "table": levels.table}
        return found | {"group": levels.group, "scales": levels.scales}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        levels = Levels(**{name: described[name] for name in ("bits", "table", "group", "scales")})
        return cls(tuple(described["shape"]), levels, tensors["codes"], tensors["scales"], tensors.get("whole"), tensors.get("table"))


# how far from its level, in levels, a weight may begin
INSIDE = 0.45


class Ranked(Soft):
    """Codes and scales that are learned. position (n, g, width): where each weight stands among the levels by rising value, in levels; the
    code is that of the nearest whole number, and the gradient passes the rounding with the mean distance to the next levels. step (n, g):
    logarithm of a factor of the scale. The table stays."""

    scale: Tensor
    order: Tensor
    rising: Tensor
    apart: Tensor

    def __init__(self, held: Leveled, target: Tensor) -> None:
        super().__init__()
        self.shape, self.levels = held.shape, held.levels
        codes, scale = held.plain()
        order, rising, _ = ranked(self.levels, held.table)
        self.register_buffer("scale", scale)
        self.register_buffer("whole", held.whole)
        self.register_buffer("table", held.table)
        self.register_buffer("order", order)
        self.register_buffer("rising", rising)
        gaps = rising.diff()
        # up and down from each level; at an end the one distance there is
        up, down = torch.cat([gaps, gaps[-1:]]), torch.cat([gaps[:1], gaps])
        self.register_buffer("apart", (up + down) / 2)
        rank = torch.zeros(2**self.levels.bits, dtype=torch.int64)
        rank[order.long()] = torch.arange(len(order))
        if self.levels.signed:
            # a negative zero
            rank[2 ** (self.levels.bits - 1)] = rank[0]
        runs = grouped(rank[codes.long()].float(), self.levels)
        at = runs.long()
        away = ratios(target.reshape(held.matrix).float(), scale, self.levels) - rising[at]
        far = away / torch.where(away > 0, up[at], down[at]).clamp(min=2.0**-60)
        # at its level, as near to the target as that allows: what is near to the next level moves first
        self.position = nn.Parameter(runs + far.clamp(-INSIDE, INSIDE))
        self.step = nn.Parameter(torch.zeros_like(scale))

    whole: Tensor | None
    table: Tensor | None

    def _scale(self) -> Tensor:
        wished = self.scale * self.step.exp()
        return through(wished, rounded_scale(wished.detach(), self.levels, self.whole))

    def _ranks(self) -> Tensor:
        return through(self.position, self.position.round()).clamp(0, len(self.order) - 1)

    def dense(self) -> Tensor:
        ranks = self._ranks()
        at = ranks.detach().long()
        # the level itself, with the gradient of a line through its neighbours
        numbers = self.rising[at] + self.apart[at] * (ranks - ranks.detach())
        return ungrouped(numbers * self._scale()[..., None], self.matrix[1]).reshape(self.shape)

    def harden(self) -> Leveled:
        with torch.no_grad():
            codes = self.order[ungrouped(self._ranks(), self.matrix[1]).long()]
            return Leveled.of(self.shape, self.levels, codes, self._scale(), self.whole, self.table)


class Scaling(Coded):
    """Scales that learn while codes stay, until they are exchanged one weight at a time. step (n, g): logarithm of a factor of the scale.
    The table stays."""

    codes: Tensor
    scale: Tensor

    def __init__(self, held: Leveled) -> None:
        super().__init__()
        self.shape, self.levels = held.shape, held.levels
        for name, tensor in zip(("codes", "scale"), held.plain(), strict=True):
            self.register_buffer(name, tensor.clone())
        self.register_buffer("whole", held.whole)
        self.register_buffer("table", held.table)
        self.step = nn.Parameter(torch.zeros_like(self.scale))

    whole: Tensor | None
    table: Tensor | None

    def _scale(self) -> Tensor:
        wished = self.scale * self.step.exp()
        return through(wished, rounded_scale(wished.detach(), self.levels, self.whole))

    def dense(self) -> Tensor:
        return decode(self.codes, self._scale(), self.levels, self.table).reshape(self.shape)

    def groups(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, 1)

    def nearest(self, index: Tensor, wished: Tensor) -> tuple[Tensor, Tensor]:
        m = self.matrix[1]
        scale = self._scale()[index // m, index % m // self.levels.width(m)][:, None]
        codes = encode(wished, scale, self.levels.row, self.table)
        return codes[:, 0], decode(codes, scale, self.levels.row, self.table)

    def exchange(self, index: Tensor, codes: Tensor) -> None:
        self.codes.view(-1)[index] = codes

    def harden(self) -> Leveled:
        with torch.no_grad():
            return Leveled.of(self.shape, self.levels, self.codes, self._scale(), self.whole, self.table)
