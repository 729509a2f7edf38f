"""One bit a weight: w = (row s + mean) column, s = -1 or +1, with a scale and a mean for each row and a factor for each column.

Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279, section 3.1, with the factors of PTQ1.61 (arXiv:2502.13179), which has them learned.
Stored: signs (n, ceil(m / 8)) uint8, row (n,), mean (n,) and column (m,) bf16: 1 + 32 / m + 16 / n bits a weight.
Sibling: quantize.grid.grouped in 1 bit (a scale for each group, none for columns)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.packed import Packed, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import Grid, through
from laconic.kernels.linear import grouped_linear

# codes 0 and 1 stand for -1/2 and +1/2 of a scale a row
HALVES = Grid(1, None, symmetric=True, zeros="half")
# how far from its sign, in steps of two, a weight may begin
INSIDE = 0.45


def narrow(value: Tensor) -> Tensor:
    """As bf16 holds it; gradients pass."""
    return through(value, value.to(torch.bfloat16).to(value.dtype))


class Signs(Packed):
    """A matrix view of `shape` in signs."""

    form = "quantize.grid.signs.Signs"
    signs: Tensor
    row: Tensor
    mean: Tensor
    column: Tensor

    def __init__(self, shape: tuple[int, ...], signs: Tensor, row: Tensor, mean: Tensor, column: Tensor) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("signs", signs)
        for name, tensor in (("row", row), ("mean", mean), ("column", column)):
            self.register_buffer(name, tensor.to(torch.bfloat16))

    @classmethod
    def of(cls, shape: tuple[int, ...], up: Tensor, row: Tensor, mean: Tensor, column: Tensor) -> Self:
        """From up (n, m) bool, true where the sign is +1."""
        return cls(shape, pack(up.to(torch.uint8), 1), row, mean, column)

    @staticmethod
    def bytes_of(n: int, m: int) -> int:
        """Stored bytes of an (n, m) matrix."""
        return n * packed_width(m, 1) + 4 * n + 2 * m

    def plain(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Signs (rows, m), row and mean (rows, 1) of the chosen rows, fp32."""
        signs = 2 * unpack(self.signs[index], 1, self.matrix[1]).float() - 1
        return signs, self.row[index].float()[:, None], self.mean[index].float()[:, None]

    def rows(self, index: Tensor | slice) -> Tensor:
        signs, row, mean = self.plain(index)
        return (row * signs + mean) * self.column.float()

    def dense(self) -> Tensor:
        return self.rows(slice(None)).reshape(self.shape)

    def matmul(self, x: Tensor) -> Tensor:
        x = x * self.column.to(x.dtype)
        signed = grouped_linear(x, self.signs, 2 * self.row[:, None], None, HALVES)
        return signed + (x.float().sum(-1, keepdim=True) * self.mean.float()).to(x.dtype)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return Flipping(self, target) if way is None else way(self, target)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape)}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(described["shape"]), tensors["signs"], tensors["row"], tensors["mean"], tensors["column"])


class Flipping(Soft):
    """Signs and factors that are learned. position (n, m): where each weight stands between -1/2 and +1/2, in steps of two scales of its
    row; its sign is that of the nearer, and its gradient passes the choice. step: logarithms of a factor of the rows, and of one of the
    columns. Means stay."""

    row: Tensor
    mean: Tensor
    column: Tensor

    def __init__(self, held: Signs, target: Tensor) -> None:
        super().__init__()
        self.shape = held.shape
        signs, row, mean = held.plain()
        for name, tensor in (("row", row), ("mean", mean), ("column", held.column.float())):
            self.register_buffer(name, tensor)
        scale = torch.where(row == 0, torch.ones_like(row), row)
        column = torch.where(self.column == 0, torch.ones_like(self.column), self.column)
        wished = (target.reshape(held.matrix).float() / column - mean) / scale
        # on the side of its sign, as near to the target as that allows: what is near to the other side moves first
        self.position = nn.Parameter(signs / 2 + ((wished - signs) / 2).clamp(-INSIDE, INSIDE))
        self.step = nn.Parameter(torch.zeros_like(row))
        self.columns = nn.ParameterDict({"step": nn.Parameter(torch.zeros_like(self.column))})

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        up = through(2 * self.position, torch.where(self.position >= 0, 1.0, -1.0))
        return up, narrow(self.row * self.step.exp()), narrow(self.column * self.columns["step"].exp())

    def dense(self) -> Tensor:
        up, row, column = self._numbers()
        return ((row * up + self.mean) * column).reshape(self.shape)

    def harden(self) -> Signs:
        with torch.no_grad():
            up, row, column = self._numbers()
            return Signs.of(self.shape, up > 0, row[:, 0], self.mean[:, 0], column)


class Factors(Soft):
    """Signs whose factors alone learn: scale (n, 1), and the corrections by_row (n, 1) and by_column (m,) that begin at one,
    w = (scale s + mean) by_row by_column column."""

    signs: Tensor
    mean: Tensor
    column: Tensor

    def __init__(self, held: Signs) -> None:
        super().__init__()
        self.shape = held.shape
        signs, row, mean = held.plain()
        for name, tensor in (("signs", signs), ("mean", mean), ("column", held.column.float())):
            self.register_buffer(name, tensor)
        self.scale = nn.Parameter(row.clone())
        self.by_row = nn.Parameter(torch.ones_like(row))
        self.by_column = nn.Parameter(torch.ones_like(self.column))

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        return narrow(self.scale * self.by_row), narrow(self.mean * self.by_row), narrow(self.column * self.by_column)

    def dense(self) -> Tensor:
        row, mean, column = self._numbers()
        return ((row * self.signs + mean) * column).reshape(self.shape)

    def harden(self) -> Signs:
        with torch.no_grad():
            row, mean, column = self._numbers()
            return Signs.of(self.shape, self.signs > 0, row[:, 0], mean[:, 0], column)
