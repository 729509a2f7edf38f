"""Grouped integer codes: b-bit codes packed densely by row, one bf16 scale (and one b-bit zero) for each group of a row.

Stored: codes (n, ceil(m b / 8)) uint8; scales (n, g) bf16; zeros (n, ceil(g b / 8)) uint8 unless symmetric. w = (code - zero) * scale.
Bits per weight: b + 16 / group (+ b / group for zeros). A last group that the row does not fill is legal and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.packed import Packed, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import Grid, as_stored, grouped, through, ungrouped
from laconic.kernels.linear import grouped_dense, grouped_linear, grouped_linear_int8


class Grouped(Packed):
    """A matrix view of `shape` on a Grid."""

    form = "quantize.grid.grouped.Grouped"
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, shape: tuple[int, ...], grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        super().__init__()
        self.shape, self.grid = tuple(shape), grid
        self._product = grouped_linear
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        if zeros is not None:
            self.register_buffer("zeros", zeros)

    @classmethod
    def of(cls, shape: tuple[int, ...], grid: Grid, codes: Tensor, scale: Tensor, zero: Tensor) -> Self:
        """From plain codes (n, m) uint8 and scale, zero (n, g)."""
        zeros = None if grid.symmetric else pack(zero.to(torch.uint8), grid.bits)
        return cls(shape, grid, pack(codes, grid.bits), scale.to(torch.bfloat16), zeros)

    @staticmethod
    def bytes_of(n: int, m: int, grid: Grid) -> int:
        """Stored bytes of an (n, m) matrix."""
        g = grid.count(m)
        return n * (packed_width(m, grid.bits) + 2 * g + (0 if grid.symmetric else packed_width(g, grid.bits)))

    def plain(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (rows, m) uint8, scale and zero (rows, g) fp32 of the chosen rows."""
        scale = self.scales[index].float()
        codes = unpack(self.codes[index], self.grid.bits, self.matrix[1])
        if self.grid.symmetric:
            return codes, scale, torch.full_like(scale, 2 ** (self.grid.bits - 1))
        return codes, scale, unpack(self.zeros[index], self.grid.bits, scale.shape[1]).float()

    def rows(self, index: Tensor | slice) -> Tensor:
        zeros = None if self.grid.symmetric else self.zeros[index]
        return grouped_dense(self.codes[index], self.scales[index], zeros, self.grid, self.matrix[1])

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x, self.codes, self.scales, None if self.grid.symmetric else self.zeros, self.grid)

    def round_inputs(self, bits: int) -> bool:
        if bits == 8:
            self._product = grouped_linear_int8
        return bits == 8

    def dense(self) -> Tensor:
        return self.rows(slice(None)).reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return Stepped(self, target) if way is None else way(self, target)

    def describe(self) -> dict[str, Any]:
        grid = self.grid
        return {"form": self.form, "shape": list(self.shape), "bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        grid = Grid(described["bits"], described["group"], described["symmetric"])
        return cls(tuple(described["shape"]), grid, tensors["codes"], tensors["scales"], tensors.get("zeros"))


# how far from its code, in steps, a weight may begin
INSIDE = 0.45


class Stepped(Soft):
    """Codes and scales that are learned. position (n, g, width): where each weight stands on its group's grid, in steps; the code is the
    nearest whole number, and its gradient passes the rounding. step (n, g): logarithm of a factor of the scale. Zeros stay."""

    scale: Tensor
    zero: Tensor

    def __init__(self, held: Grouped, target: Tensor) -> None:
        super().__init__()
        self.shape, self.grid = held.shape, held.grid
        codes, scale, zero = held.plain()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        runs = grouped(codes.float(), self.grid)
        wished = grouped(target.reshape(held.matrix).float(), self.grid) / scale[..., None] + zero[..., None]
        # in the cell of its code, as near to the target as that allows: what is near to the next code moves first
        self.position = nn.Parameter(runs + (wished - runs).clamp(-INSIDE, INSIDE))
        self.step = nn.Parameter(torch.zeros_like(scale))

    def _scale(self) -> Tensor:
        return as_stored(self.scale * self.step.exp())

    def _codes(self) -> Tensor:
        return through(self.position, self.position.round()).clamp(0, 2**self.grid.bits - 1)

    def dense(self) -> Tensor:
        return ungrouped((self._codes() - self.zero[..., None]) * self._scale()[..., None], self.matrix[1]).reshape(self.shape)

    def harden(self) -> Grouped:
        with torch.no_grad():
            codes = ungrouped(self._codes(), self.matrix[1]).to(torch.uint8)
            return Grouped.of(self.shape, self.grid, codes, self._scale(), self.zero)
