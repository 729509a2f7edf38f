"""Inputs rounded with the weights: each token's entries go to an integer grid of its own scale on their way into the product.

Token-wise quantization of activations, Yao et al. 2022 (ZeroQuant), arXiv:2206.01861, section 4.1:
y = W_q Q(x),  Q(x) = s round(x / s),  s = max_m |x_m| / (2^(b-1) - 1).  x (..., m), one s a token, found as it comes: no data is needed and
nothing is stored. Weights are held by `hold`, a grid with one scale a row (group null) being the "per channel" of the papers: W8A8, W4A8.
A convolution has one scale a sample, over all its channels and places. Only products round; a table that is looked up in does not.
`inputs: e4m3` takes the floats of that format in place of even steps, with s = max_m |x_m| / 448 (FireQ, arXiv:2505.20839).
With `step` a matrix holds one number more: which share of a token's largest entry is the outermost point, 1 until a lesson has learned it.
Sibling: quantize.round.rtn (weights alone)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Feeding, Packed, Soft, SoftFeeding, Way, below, restore
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.transform import Change, Stats, Transform, at_level
from laconic.kernels.grids import Grid
from laconic.kernels.inputs import floating, rounded, stepped

CARD = Card(Paper("Yao et al.", 2022, "arXiv:2206.01861", "section 4.1"), catalogue="", sibling="quantize.round.rtn")


# of whole numbers, how many; or a float format
Bits = int | Literal["e4m3"]


def _fed(x: Tensor, bits: Bits, axes: int, share: Tensor | None = None) -> Tensor:
    """Inputs of a weight of so many axes: (..., m) of a matrix or of a matrix view, (b, m, ...) of a convolution."""
    axes = axes - 1 if x.dim() == axes > 2 else 1
    if bits == "e4m3":
        return floating(x, axes)
    return rounded(x, bits, axes) if share is None else stepped(x, bits, share, axes)


def _learned(x: Tensor, bits: Bits, axes: int, ends: Tensor) -> Tensor:
    """As `_fed`, with the logarithm of the share."""
    return _fed(x, bits, axes, ends.exp())


class Fed(Feeding):
    """`inner`, whose products round their inputs to `bits`: each token by its last axis, of a convolution each sample as a whole; share
    (1,) fp32, where there is one: of the largest entry."""

    form = "quantize.round.inputs.Fed"
    share: Tensor | None

    def __init__(self, inner: Packed, bits: Bits, share: Tensor | None = None) -> None:
        super().__init__(inner)
        self.bits = bits
        self.register_buffer("share", share)

    @property
    def feed(self) -> Callable[[Tensor], Tensor]:
        return partial(_fed, bits=self.bits, axes=len(self.shape), share=self.share)

    def over(self, inner: Packed) -> Fed:
        return Fed(inner, self.bits, self.share)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        soft = self.inner.soften(target, way)
        return None if soft is None else SoftFed(self.over(soft))

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "bits": self.bits, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(restore(described["inner"], below(tensors, "inner")), described["bits"], tensors.get("share"))


class SoftFed(SoftFeeding):
    """A Fed whose inner form is learned, and where it holds a share the logarithm of that, ends (1,)."""

    def __init__(self, around: Fed) -> None:
        super().__init__(around)
        self.bits = around.bits
        self.ends = None if around.share is None else nn.Parameter(around.share.log())

    @property
    def feed(self) -> Callable[[Tensor], Tensor]:
        return self.around.feed if self.ends is None else partial(_learned, bits=self.bits, axes=len(self.shape), ends=self.ends)

    def harden(self) -> Fed:
        return Fed(self.inner.harden(), self.bits, None if self.ends is None else self.ends.detach().exp())


@dataclass(frozen=True)
class WeightAndInputs:
    """Level: the grid of the weights, and the bits of what they are multiplied with, or its float format; step: whether a share of their
    range is held, which floats have no use for."""

    weight: Grid
    inputs: Bits = 8
    step: bool = False

    def __post_init__(self) -> None:
        if self.inputs != "e4m3" and not (isinstance(self.inputs, int) and 2 <= self.inputs <= 8):
            raise ValueError(f"inputs={self.inputs}: inputs have 2 to 8 bits, or are in e4m3")
        if self.step and self.inputs == "e4m3":
            raise ValueError("step: true is for inputs in whole numbers; floats of e4m3 reach as far as a token's largest entry")


@dataclass(frozen=True)
class Inputs(Transform):
    """hold: how the weights are held."""

    hold: Transform

    acts_on = (Linear, Embedding, Conv)
    level = WeightAndInputs

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        """What the weights' method wants."""
        return self.hold.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: WeightAndInputs) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[WeightAndInputs]) -> Iterator[Change]:
        """The weights' method at all levels together."""
        for level, change in zip(levels, self.hold.several(site, weights, stats, [level.weight for level in levels]), strict=True):
            held = {tensor: Fed(form, level.inputs, torch.ones(1) if level.step else None) for tensor, form in change.hold.items()}
            yield Change(hold=held, notes=change.notes)

    def stored(self, site: Site, level: WeightAndInputs) -> int:
        return self.hold.stored(site, at_level(self.hold, level.weight)) + 4 * level.step
