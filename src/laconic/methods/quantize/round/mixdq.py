"""MixDQ's inputs: one range a tensor, and a first token that never changes kept out of it.

Zhao et al. 2024, arXiv:2405.17873, section 4.1. A caption begins with the same token always, whose features are far larger than all others'
(800 beside 10 to 15): a range that takes it in leaves the words a step or two. Its keys and values are the same for every caption, so they
are made once, by the weights before they are rounded, and stored. Of inputs x (..., t, m) of a matrix,
x_q[i] = s (clamp(round(x[i] / s) + z, 0, 2^b - 1) - z),  s = (high - low) / (2^b - 1),  z = round(-low / s),
low and high over positions 1 to t - 1 of calibration; over all, and none is apart, where the first changes or what a matrix is given does
not come from outside the stack of layers. What is stored of a first token x0 is no product but an input f (m,) fp16 that gives it:
f = argmin |W_q f - W x0|, of those the shortest, so that the rounded product is whole in the matrix and its inputs. Scale and zero 8 bytes
a matrix, and 2 m for f where inputs come from outside. Weights are held by `hold`. Tables stay `hold`'s.
The paper's search for bits is search.decouple.mixdq. Sibling: quantize.round.inputs (a scale for each token, found as it comes)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Feeding, Packed, below, restore
from laconic.core.site import Embedding, Linear, Site
from laconic.core.statistic import Extremes, Opening
from laconic.core.transform import Change, Stats, Transform, at_level
from laconic.kernels.grids import Grid
from laconic.kernels.ranges import Beyond, steps_of

CARD = Card(Paper("Zhao et al.", 2024, "arXiv:2405.17873", "section 4.1"), catalogue="mixdq", sibling="quantize.round.inputs")

# what goes up and down by less than this share of the greatest input never changes
STILL = 1e-5
# of the trace of a rounded matrix's gram, added to its diagonal
RIDGE = 1e-9


class Ranged(Feeding):
    """`inner`, whose products round their inputs in one range, scale and zero (1,) fp32; standing (m,) fp16 where what comes from outside
    is read, and `apart` says whether it stands for the first position."""

    form = "quantize.round.mixdq.Ranged"
    scale: Tensor
    zero: Tensor
    standing: Tensor | None

    def __init__(self, inner: Packed, bits: int, apart: bool, scale: Tensor, zero: Tensor, standing: Tensor | None) -> None:
        super().__init__(inner)
        self.bits, self.apart = bits, apart
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("standing", standing)

    @property
    def feed(self) -> Beyond:
        standing = self.standing.clone() if self.apart and self.standing is not None else None
        return Beyond(self.bits, standing, self.scale.clone(), self.zero.clone())

    def over(self, inner: Packed) -> Ranged:
        return Ranged(inner, self.bits, self.apart, self.scale, self.zero, self.standing)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "bits": self.bits, "apart": self.apart, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        inner = restore(described["inner"], below(tensors, "inner"))
        return cls(inner, described["bits"], described["apart"], tensors["scale"], tensors["zero"], tensors.get("standing"))


@dataclass(frozen=True)
class OneRange:
    """Level: the grid of the weights, and the bits of what they are multiplied with, 4 or 8 in the paper."""

    weight: Grid
    inputs: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.inputs <= 8:
            raise ValueError(f"inputs={self.inputs}: inputs have 2 to 8 bits")


@dataclass(frozen=True)
class MixDQ(Transform):
    """hold: how the weights are held. aware: keep a first token that never changes out of the range."""

    hold: Transform
    aware: bool = True

    acts_on = (Linear, Embedding)
    level = OneRange

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        """What the weights' method wants, the ends of inputs, and whether the first changes."""
        return (*self.hold.wants, Extremes(), Opening())

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: OneRange) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[OneRange]) -> Iterator[Change]:
        """The weights' method at all levels together."""
        for level, change in zip(levels, self.hold.several(site, weights, stats, [level.weight for level in levels]), strict=True):
            if isinstance(site.kind, Embedding):
                yield change
                continue
            held = {
                tensor: self._ranged(form, weights[role], site, stats, level.inputs)
                for role, tensor in site.tensors.items()
                if (form := change.hold.get(tensor)) is not None
            }
            yield Change(hold={**change.hold, **held}, place=change.place, notes=change.notes)

    def _ranged(self, form: Packed, weight: Tensor, site: Site, stats: Stats, bits: int) -> Ranged:
        ends, opening, m = stats[Extremes()], stats[Opening()], form.matrix[1]
        read = reads_outside(site)
        apart = self.aware and read and still(opening, ends)
        low, high = ends[:, m + 1 :] if apart else ends
        scale, zero = steps_of(low.min().reshape(1), high.max().reshape(1), bits)
        standing = None
        if read:
            standing = torch.zeros(m, dtype=torch.float16)
            if apart:
                standing = stand_in(form.dense().reshape(form.matrix), weight.reshape(form.matrix), opening.mean(0)).half()
                apart = bool(torch.isfinite(standing).all())
        return Ranged(form, bits, apart, scale, zero, standing)

    def stored(self, site: Site, level: OneRange) -> int:
        size = self.hold.stored(site, at_level(self.hold, level.weight))
        if isinstance(site.kind, Embedding):
            return size
        return size + 8 + (2 * site.matrix[1] if reads_outside(site) else 0)


def reads_outside(site: Site) -> bool:
    """Whether sequences of one length come to a matrix from outside the stack of layers, as a caption does."""
    return bool(site.context.get("outside")) and int(site.context.get("positions", 1)) > 1


def still(opening: Tensor, ends: Tensor) -> bool:
    """Whether no channel of the first token, ends (2, m), goes up and down, beside ends (2, ...) of all inputs."""
    return bool((opening[1] - opening[0]).max() <= STILL * ends.abs().max())


def stand_in(rounded: Tensor, weight: Tensor, first: Tensor) -> Tensor:
    """The shortest input (m,) that a rounded matrix (n, m) takes nearest to what the matrix makes of `first` (m,)."""
    a, wished = rounded.double(), weight.double() @ first.double()
    wide = a.shape[0] < a.shape[1]
    gram = a @ a.T if wide else a.T @ a
    # one that is singular reads nothing of what would be asked of it
    gram.diagonal().add_(RIDGE * gram.diagonal().sum().clamp(min=torch.finfo(torch.float32).tiny))
    found = torch.cholesky_solve((wished if wide else a.T @ wished)[:, None], torch.linalg.cholesky(gram))[:, 0]
    return (a.T @ found if wide else found).float()
