"""Some columns of a matrix in a form of their own: outliers, say, that are held more finely than the rest.

Stored: both forms, of the chosen columns (n, c) and of all others (n, m - c), and columns (c,) int32, rising.
Sibling: quantize.grid.vectors (one form for all columns)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.packed import Packed, Soft, Way, below, restore


def others(columns: Tensor, m: int) -> Tensor:
    """The columns below m that are not among these, rising."""
    left = torch.ones(m, dtype=torch.bool)
    left[columns.long()] = False
    return left.nonzero()[:, 0]


class Apart(Packed):
    """A matrix view of `shape`, `few` for its `columns` and `rest` for the others."""

    form = "quantize.grid.apart.Apart"
    columns: Tensor

    def __init__(self, shape: tuple[int, ...], rest: Packed, few: Packed, columns: Tensor) -> None:
        super().__init__()
        self.shape, self.rest, self.few = tuple(shape), rest, few
        self.register_buffer("columns", columns.to(torch.int32))

    def _joined(self, rest: Tensor, few: Tensor) -> Tensor:
        out = rest.new_empty(rest.shape[0], self.matrix[1])
        out[:, others(self.columns, self.matrix[1])] = rest
        out[:, self.columns.long()] = few
        return out

    def rows(self, index: Tensor | slice) -> Tensor:
        return self._joined(self.rest.rows(index), self.few.rows(index))

    def matmul(self, x: Tensor) -> Tensor:
        return self.rest.matmul(x[..., others(self.columns, self.matrix[1])]) + self.few.matmul(x[..., self.columns.long()])

    def dense(self) -> Tensor:
        return self._joined(self.rest.dense(), self.few.dense()).reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        matrix = target.reshape(self.matrix)
        rest = self.rest.soften(matrix[:, others(self.columns, self.matrix[1])], way)
        few = self.few.soften(matrix[:, self.columns.long()], way)
        return None if rest is None or few is None else SoftApart(self.shape, rest, few, self.columns)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), "rest": self.rest.describe(), "few": self.few.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        rest, few = (restore(described[name], below(tensors, name)) for name in ("rest", "few"))
        return cls(tuple(described["shape"]), rest, few, tensors["columns"])


class SoftApart(Soft):
    """An Apart both of whose forms are learned."""

    columns: Tensor

    def __init__(self, shape: tuple[int, ...], rest: Soft, few: Soft, columns: Tensor) -> None:
        super().__init__()
        self.shape, self.rest, self.few = shape, rest, few
        self.register_buffer("columns", columns)

    def dense(self) -> Tensor:
        rest, few = self.rest.dense(), self.few.dense()
        order = torch.cat([others(self.columns, self.matrix[1]), self.columns.long()])
        return torch.cat([rest, few], 1)[:, order.argsort()].reshape(self.shape)

    def harden(self) -> Apart:
        return Apart(self.shape, self.rest.harden(), self.few.harden(), self.columns)
