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

from laconic.core.packed import Coded, Packed, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import Grid, through
from laconic.kernels.linear import grouped_linear

# codes 0 and 1 stand for -1/2 and +1/2 of a scale a row
HALVES = Grid(1, None, symmetric=True, zeros="half")
# how far from its sign, in steps of two, a weight may begin
INSIDE = 0.45


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
        """From up (n, m) bool, true where the sign is +1; row and mean (n,), column (m,)."""
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

    def coded(self) -> Coded:
        return Factors(self)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape)}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(described["shape"]), tensors["signs"], tensors["row"], tensors["mean"], tensors["column"])


class Factor(nn.Module):
    """Factors that learn, one at first. step: their logarithms."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.zeros_like(like))

    def forward(self, value: Tensor) -> Tensor:
        """The value times the factors."""
        return value * self.step.exp()


class Factors(Coded):
    """Numbers that learn while signs stay, until these are exchanged one by one: w = (row alpha s + mean) by_row by_column column, with
    factors alpha (n, 1), by_row (n, 1) and by_column (m,)."""

    signs: Tensor
    row: Tensor
    mean: Tensor
    column: Tensor

    def __init__(self, held: Signs) -> None:
        super().__init__()
        self.shape = held.shape
        for name, tensor in zip(("signs", "row", "mean", "column"), (*held.plain(), held.column.float()), strict=True):
            self.register_buffer(name, tensor.clone())
        self.alpha, self.by_row, self.by_column = Factor(self.row), Factor(self.row), Factor(self.column)

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row and mean (n, 1), column (m,) with the values that they are stored with; gradients pass that rounding."""
        wished = self.by_row(self.alpha(self.row)), self.by_row(self.mean), self.by_column(self.column)
        row, mean, column = (through(value, value.detach().bfloat16().float()) for value in wished)
        return row, mean, column

    def signed(self, signs: Tensor) -> Tensor:
        """The tensor that these signs (n, m) are."""
        row, mean, column = self.numbers()
        return ((row * signs + mean) * column).reshape(self.shape)

    def stored(self, signs: Tensor) -> Signs:
        """The form that these signs (n, m) are."""
        with torch.no_grad():
            row, mean, column = self.numbers()
            return Signs.of(self.shape, signs > 0, row[:, 0], mean[:, 0], column)

    def dense(self) -> Tensor:
        return self.signed(self.signs)

    def groups(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, 1)

    def nearest(self, index: Tensor, wished: Tensor) -> tuple[Tensor, Tensor]:
        row, mean, column = self.numbers()
        at, factor = index // self.matrix[1], column[index % self.matrix[1], None]
        step = row[at] * factor
        codes = ((wished - mean[at] * factor) * step >= 0).to(torch.uint8)
        return codes[:, 0], (2 * codes.float() - 1) * step + mean[at] * factor

    def exchange(self, index: Tensor, codes: Tensor) -> None:
        self.signs.view(-1)[index] = 2 * codes.float() - 1

    def harden(self) -> Signs:
        return self.stored(self.signs)


class Flipping(Soft):
    """Signs and numbers that are learned. position (n, m): where each weight stands between -1/2 and +1/2, in steps of two scales of its
    row; its sign is that of the nearer, and its gradient passes the choice."""

    def __init__(self, held: Signs, target: Tensor) -> None:
        super().__init__()
        self.shape = held.shape
        own = self.inner = Factors(held)
        row, column = (torch.where(value == 0, 1.0, value) for value in (own.row, own.column))
        wished = (target.reshape(held.matrix).float() / column - own.mean) / row
        # on the side of its sign, as near to the target as that allows: what is near to the other side moves first
        self.position = nn.Parameter(own.signs / 2 + ((wished - own.signs) / 2).clamp(-INSIDE, INSIDE))

    def _signs(self) -> Tensor:
        return through(2 * self.position, torch.where(self.position >= 0, 1.0, -1.0))

    def dense(self) -> Tensor:
        return self.inner.signed(self._signs())

    def harden(self) -> Signs:
        return self.inner.stored(self._signs())
