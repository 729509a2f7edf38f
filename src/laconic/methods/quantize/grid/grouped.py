"""Grouped integer codes: b-bit codes packed densely by row, one scale (and one b-bit zero) for each group of a row.

Stored: codes (n, ceil(m b / 8)) uint8; scales (n, g) bf16, or uint8 and one int16 `least` for all, scale = 2^((least + scales) / 32), or
2^least times the number that the byte is in e4m3 (FireQ's, Baek et al. 2025, arXiv:2505.20839: `least` is its factor of the matrix);
zeros (n, ceil(g z / 8)) uint8 unless symmetric, z = b bits, or b + 1 where they are counted in halves. w = (code - zero) * scale.
Bits per weight: b + 16 / group, or b + 8 / group (+ z / group for zeros). A last group that the row does not fill is legal and counted.
Scales of 8 bits lose nothing that can be seen: codes are chosen for the scales as they are stored, in log8 at most 1.1 % from any wished
one, in e4m3 at most 6.25 %."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.packed import Coded, Packed, Read, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import (
    SPAN,
    Grid,
    as_stored,
    decode,
    encode,
    from_bytes,
    grouped,
    notched,
    notches,
    octave_of,
    storable,
    through,
    to_bytes,
    ungrouped,
)
from laconic.kernels.linear import grouped_dense, grouped_linear, grouped_linear_int8, zeros_of
from laconic.kernels.sparse import Codes


class Grouped(Packed):
    """A matrix view of `shape` on a Grid."""

    form = "quantize.grid.grouped.Grouped"
    codes: Tensor
    scales: Tensor
    least: Tensor
    zeros: Tensor

    def __init__(
        self, shape: tuple[int, ...], grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor | None, least: Tensor | None = None
    ) -> None:
        super().__init__()
        self.shape, self.grid = tuple(shape), grid
        self._product = grouped_linear
        # of scales of 8 bits: in 16 bits, once a product has asked for them
        self.wide: Tensor | None = None
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        for name, tensor in (("zeros", zeros), ("least", least)):
            if tensor is not None:
                self.register_buffer(name, tensor)

    @classmethod
    def of(cls, shape: tuple[int, ...], grid: Grid, codes: Tensor, scale: Tensor, zero: Tensor) -> Self:
        """From plain codes (n, m) uint8 and scale, zero (n, g). Scales that cannot be stored beside the others are raised, their groups'
        codes chosen again."""
        held = storable(scale, grid)
        # small scales of e4m3 may move either way
        if grid.scales != "bf16" and bool((held.ne(scale) if grid.scales == "e4m3" else held.gt(scale)).any()):
            plain = ungrouped((grouped(codes.float(), grid) - zero[..., None]) * scale[..., None], codes.shape[1])
            codes, scale = encode(plain, held, zero, grid), held
        return cls.packed(shape, grid, pack(codes, grid.bits), scale, zero)

    @classmethod
    def packed(cls, shape: tuple[int, ...], grid: Grid, codes: Tensor, scale: Tensor, zero: Tensor) -> Self:
        """From packed codes and a scale and zero (n, g) that can be stored as they are."""
        zeros = None if grid.symmetric else pack((zero * grid.zero_steps).to(torch.uint8), grid.zero_bits)
        if grid.scales == "bf16":
            return cls(shape, grid, codes, scale.to(torch.bfloat16), zeros)
        if grid.scales == "e4m3":
            least = octave_of(scale.max()) if scale.numel() else torch.zeros((), dtype=torch.int32)
            return cls(shape, grid, codes, to_bytes(torch.ldexp(scale, -least)), zeros, least.to(torch.int16).reshape(1))
        number = notches(scale)
        least = number.max().sub(SPAN - 1) if number.numel() else number.new_zeros(())
        return cls(shape, grid, codes, number.sub(least).to(torch.uint8), zeros, least.to(torch.int16).reshape(1))

    @staticmethod
    def bytes_of(n: int, m: int, grid: Grid) -> int:
        """Stored bytes of an (n, m) matrix."""
        g = grid.count(m)
        scales = 2 * g * n if grid.scales == "bf16" else g * n + 2
        return n * (packed_width(m, grid.bits) + packed_width(g, grid.zero_bits)) + scales

    def wide_scales(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Scales of the chosen rows (rows, g) bf16."""
        if self.grid.scales == "bf16":
            return self.scales[index]
        if self.grid.scales == "e4m3":
            return torch.ldexp(from_bytes(self.scales[index]), self.least.to(torch.int32)).to(torch.bfloat16)
        return notched(self.scales[index].to(torch.int32) + self.least.to(torch.int32)).to(torch.bfloat16)

    def plain(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (rows, m) uint8, scale and zero (rows, g) fp32 of the chosen rows."""
        scale = self.wide_scales(index).float()
        codes = unpack(self.codes[index], self.grid.bits, self.matrix[1])
        return codes, scale, zeros_of(None if self.grid.symmetric else self.zeros[index], scale, self.grid)

    def rows(self, index: Tensor | slice) -> Tensor:
        zeros = None if self.grid.symmetric else self.zeros[index]
        return grouped_dense(self.codes[index], self.wide_scales(index), zeros, self.grid, self.matrix[1])

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None, Grid]:
        """As kernels take it."""
        scales = self.scales
        if self.grid.scales != "bf16":
            if self.wide is None or self.wide.device != scales.device:
                self.wide = self.wide_scales()
            scales = self.wide
        return self.codes, scales, None if self.grid.symmetric else self.zeros, self.grid

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x, *self._stored())

    def read(self) -> Read:
        codes, scales, zeros, grid = self._stored()
        return Read(codes, scales, zeros, grid.bits, grid.group or 0, grid.zeros == "half", self._product is grouped_linear_int8)

    def line(self) -> Codes:
        return Codes(*self._stored(), self.matrix[1])

    def round_inputs(self, bits: int) -> bool:
        if bits == 8:
            self._product = grouped_linear_int8
        return bits == 8

    def dense(self) -> Tensor:
        return self.rows(slice(None)).reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return Stepped(self, target) if way is None else way(self, target)

    def coded(self) -> Coded:
        return Scales(self)

    def describe(self) -> dict[str, Any]:
        grid = self.grid
        found = {"form": self.form, "shape": list(self.shape), "bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric}
        # what is usual is not said, as it was not before there was anything else
        unusual = {"scales": grid.scales} if grid.scales != "bf16" else {}
        return found | unusual | ({"zeros": grid.zeros} if grid.zeros != "whole" else {})

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        named = {name: described[name] for name in ("bits", "group", "symmetric", "scales", "zeros") if name in described}
        grid = Grid(**named)
        return cls(tuple(described["shape"]), grid, tensors["codes"], tensors["scales"], tensors.get("zeros"), tensors.get("least"))


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
        return as_stored(self.scale * self.step.exp(), self.grid)

    def _codes(self) -> Tensor:
        return through(self.position, self.position.round()).clamp(0, 2**self.grid.bits - 1)

    def dense(self) -> Tensor:
        return ungrouped((self._codes() - self.zero[..., None]) * self._scale()[..., None], self.matrix[1]).reshape(self.shape)

    def harden(self) -> Grouped:
        with torch.no_grad():
            codes = ungrouped(self._codes(), self.matrix[1]).to(torch.uint8)
            return Grouped.of(self.shape, self.grid, codes, self._scale(), self.zero)


class Scales(Coded):
    """Scales that learn while codes stay, until they are exchanged one weight at a time. step (n, g): logarithm of a factor of the scale.
    Zeros stay."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, held: Grouped) -> None:
        super().__init__()
        self.shape, self.grid = held.shape, held.grid
        for name, tensor in zip(("codes", "scale", "zero"), held.plain(), strict=True):
            self.register_buffer(name, tensor.clone())
        self.step = nn.Parameter(torch.zeros_like(self.scale))

    def _scale(self) -> Tensor:
        return as_stored(self.scale * self.step.exp(), self.grid)

    def dense(self) -> Tensor:
        runs = grouped(self.codes.float(), self.grid) - self.zero[..., None]
        return ungrouped(runs * self._scale()[..., None], self.matrix[1]).reshape(self.shape)

    def groups(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, 1)

    def nearest(self, index: Tensor, wished: Tensor) -> tuple[Tensor, Tensor]:
        at = index // self.matrix[1], self.grid.index(self.matrix[1])[index % self.matrix[1]]
        scale, zero = self._scale()[at][:, None], self.zero[at][:, None]
        codes = encode(wished, scale, zero, self.grid.row)
        return codes[:, 0], decode(codes, scale, zero, self.grid.row)

    def exchange(self, index: Tensor, codes: Tensor) -> None:
        self.codes.view(-1)[index] = codes

    def harden(self) -> Grouped:
        with torch.no_grad():
            return Grouped.of(self.shape, self.grid, self.codes, self._scale(), self.zero)
