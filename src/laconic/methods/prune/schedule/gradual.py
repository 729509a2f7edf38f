"""Gradual magnitude pruning: weights go a few at a time while those that stay learn, until as many are gone as are to go.

Zhu and Gupta 2017, arXiv:1710.01878, section 3: of n weights s_t n are zero after the share t of the steps, s_t = s (1 - (1 - t / T)^3),
those of least |w|, chosen anew at every step until the share T = `until` of the steps; the rest of them tune what is left. Elsen et al.
2020, arXiv:1911.09723, section 4, train their sparse convolutional networks so (their products are `kernels.sparse.sparse_pixels`); here it
begins with a trained network and brings it back to the original's predictions.
It acts on what is held sparse with its weights as numbers, and keeps the bytes: as many weights in each row where each row has as many,
else in the matrix (an n:m pattern becomes as many in each row). All else that is held learns in its own way.
Sibling: quantize.train.straight (the same lesson, with the weights that went already gone)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Dense, Packed, Soft
from laconic.core.transform import Lesson, Objective
from laconic.kernels.bits import unpack
from laconic.kernels.losses import Divergence
from laconic.methods.prune.cut.sparse import Sparse

CARD = Card(
    Paper("Elsen et al.", 2020, "arXiv:1911.09723", "sections 3.1 and 4"),
    catalogue="fast-sparse-convnets",
    sibling="quantize.train.straight",
    exceptions={"a soft form computes what it stores": "weights that are still to go are there until the schedule has taken them"},
)


def gone(done: float, final: float, until: float) -> float:
    """The share of weights that are zero once the share `done` of the steps is behind: final (1 - (1 - done / until)^3)."""
    return final * (1 - (1 - min(1.0, done / until)) ** 3)


def greatest(weight: Tensor, keep: int) -> Tensor:
    """weight (r, m) -> (r, m) bool: the `keep` of each row with the greatest absolute value, the first of equal ones."""
    order = weight.abs().argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)


class Going(Soft):
    """A matrix on its way to being sparse. weight (n, m); final: the share that will be gone."""

    held: Tensor

    def __init__(self, held: Sparse, target: Tensor, until: float) -> None:
        super().__init__()
        self.shape, self.until = held.shape, until
        mask = unpack(held.mask, 1, self.matrix[1]).bool()
        counts = mask.sum(1)
        # a share of each row, or of all of it
        self.even = bool((counts == counts[0]).all())
        self.keep = int(counts[0]) if self.even else int(counts.sum())
        self.register_buffer("held", mask)
        value: Dense = held.values  # type: ignore[assignment]
        self.kind = value.value.dtype
        # what is held where it is held, the original elsewhere
        self.weight = nn.Parameter(torch.where(mask, held.dense().reshape(self.matrix), target.reshape(self.matrix).float()))
        self.done = 0.0

    def _rows(self, weight: Tensor) -> Tensor:
        return weight if self.even else weight.reshape(1, -1)

    def _mask(self, done: float) -> Tensor:
        rows = self._rows(self.weight.detach())
        count, final = rows.shape[1], 1 - self.keep / rows.shape[1]
        left = count - round(count * gone(done, final, self.until))
        return greatest(rows, max(left, self.keep)).reshape(self.matrix)

    def dense(self) -> Tensor:
        return (self.weight * self._mask(self.done)).reshape(self.shape)

    def penalty(self, done: float) -> Tensor | None:
        # it costs nothing, and says how far the lesson is
        self.done = done
        return None

    def harden(self) -> Sparse:
        mask = self._mask(1.0) if self.done else self.held
        return Sparse.of(self.shape, mask, Dense(Sparse.gather(self.weight.detach(), mask).to(self.kind)))


KL = Divergence()


@dataclass(frozen=True)
class Gradual(Lesson):
    """until: the share of the steps after which no more weights go. Defaults: 320 steps of 4 sequences by Adam, the rate falling along a
    cosine; the paper trains for as long as the dense network was."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("weight", 1e-3), ("position", 5e-3), ("step", 3e-3))
    steps: int = 320
    batch: int = 4
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    until: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until={self.until}: a share of the steps above 0, at most 1")

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        if isinstance(held, Sparse) and isinstance(held.values, Dense):
            return Going(held, target, self.until)
        return held.soften(target)
