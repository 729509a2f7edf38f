"""A matrix as one row of another form, so that a grid with one group a row has one scale, and one zero, for all of it.

Stored: what the form of the row (1, n m) stores. Sibling: quantize.grid.grouped (a scale for each group of a row)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Self

from laconic.core.packed import Packed, Soft, Way, below, restore


class Flat(Packed):
    """`inner` (1, n m) in `shape`."""

    form = "quantize.grid.flat.Flat"

    def __init__(self, shape: tuple[int, ...], inner: Packed) -> None:
        super().__init__()
        self.shape, self.inner = tuple(shape), inner

    def dense(self) -> Tensor:
        return self.inner.dense().reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        soft = self.inner.soften(target.reshape(1, -1), way)
        return None if soft is None else SoftFlat(self.shape, soft)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(described["shape"]), restore(described["inner"], below(tensors, "inner")))


class SoftFlat(Soft):
    """A Flat that is learned."""

    def __init__(self, shape: tuple[int, ...], inner: Soft) -> None:
        super().__init__()
        self.shape, self.inner = shape, inner

    def dense(self) -> Tensor:
        return self.inner.dense().reshape(self.shape)

    def harden(self) -> Flat:
        return Flat(self.shape, self.inner.harden())
