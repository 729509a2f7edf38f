"""Sparse: one bit for each weight says whether it is there, and those that are there are held in some form of their own.

Stored: mask (n, ceil(m / 8)) uint8, and the kept weights as a matrix: (n, kept) where every row keeps as many, else (1, kept in all).
Products are Flash-LLM's, Xia et al. 2023, arXiv:2309.10285: "load as sparse, compute as dense".  What is read is what is stored, 2 bytes a
kept weight in bf16 and 1/8 byte for every weight; on the way to the multiplication it is spread out, zeros and all (kernels/sparse.py).
Flash-LLM's own format, Tiled-CSL, has a position of 16 bits with each weight in place of the bits, which is more where over 1/16 is kept.
Sibling: prune.cut.drop (which weights go)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft, Way, below, restore
from laconic.kernels.bits import pack, unpack
from laconic.kernels.sparse import Kept, row_starts, sparse_linear, sparse_pixels, sparse_rows

CARD = Card(Paper("Xia et al.", 2023, "arXiv:2309.10285"), catalogue="flash-llm", sibling="prune.cut.drop")

# the share of weights up to which a convolution of 1 x 1 is quicker sparse than dense
DENSEST = 0.35


class Sparse(Packed):
    """A matrix view of `shape` with most entries zero."""

    form = "prune.cut.sparse.Sparse"
    mask: Tensor

    def __init__(self, shape: tuple[int, ...], mask: Tensor, values: Packed) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("mask", mask)
        self.values = values
        # where the weights of each row begin: counted once a product has asked for them, and not stored
        self.starts: Tensor | None = None

    @staticmethod
    def gather(weight: Tensor, mask: Tensor) -> Tensor:
        """The kept entries of weight (n, m) as the matrix they are held as."""
        counts = mask.sum(1)
        n = weight.shape[0] if bool((counts == counts[0]).all()) else 1
        return weight[mask].reshape(n, -1)

    @classmethod
    def of(cls, shape: tuple[int, ...], mask: Tensor, values: Packed) -> Self:
        """mask (n, m) bool; values: the form of `gather(weight, mask)`."""
        return cls(shape, pack(mask.to(torch.uint8), 1), values)

    def _starts(self) -> Tensor:
        if self.starts is None or self.starts.device != self.mask.device:
            self.starts = row_starts(self.mask, self.matrix[1])
        return self.starts

    def _line(self) -> Kept:
        line = self.values.line()
        # no kernel knows these
        return line.float() if isinstance(line, Tensor) and line.dtype == torch.float64 else line

    def rows(self, index: Tensor | slice) -> Tensor:
        return sparse_rows(self.mask, self._line(), self.matrix[1], index, self._starts())

    def matmul(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.mask, self._line(), self._starts())

    def pixels(self, x: Tensor) -> Tensor | None:
        # the same product where most is zero; torch is quicker where it is not
        few = float(self._starts()[-1]) <= DENSEST * self.matrix[0] * self.matrix[1]
        return sparse_pixels(x, self.mask, self._line(), self._starts()) if few else None

    def dense(self) -> Tensor:
        return self.rows(slice(None)).reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        mask = unpack(self.mask, 1, self.matrix[1]).bool()
        soft = self.values.soften(self.gather(target.reshape(self.matrix), mask), way)
        return None if soft is None else SoftSparse(self.shape, mask, soft)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), "values": self.values.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tuple(described["shape"]), tensors["mask"], restore(described["values"], below(tensors, "values")))


class SoftSparse(Soft):
    """A Sparse whose kept weights are learned; its mask stays."""

    mask: Tensor

    def __init__(self, shape: tuple[int, ...], mask: Tensor, values: Soft) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("mask", mask)
        self.values = values

    def dense(self) -> Tensor:
        return torch.zeros(self.matrix).masked_scatter(self.mask, self.values.dense()).reshape(self.shape)

    def harden(self) -> Sparse:
        return Sparse.of(self.shape, self.mask, self.values.harden())
