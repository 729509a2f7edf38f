"""DGQ: inputs rounded in groups of channels or of positions that have like ranges, and attention over words in powers of a half.

Ryu et al. 2025, arXiv:2501.04304. Groups (section 4.1): the axis, channels or positions (pixels, words), is the one along which the least
and the greatest inputs of calibration deviate most; its pairs (least, greatest) fall into g clusters by k-means, each with its own steps,
x_q = s (clamp(round(x / s) + z, 0, 2^b - 1) - z),  s = (high - low) / (2^b - 1),  z = round(-low / s).  Maps (section 4.2): of the
shares p of an attention over another sequence the first word's is kept as it is, since it has a peak of its own; of the others
q = clamp(round(-log2(p / delta)), 0, 2^b - 1),  delta the greatest of them in the map of one sample, found as it comes.
Ends of channels (2, m) and positions (2, t) -> index (m,) or (t,) uint8, scale and zero (g,) fp32: max(m, t) + 8 g bytes a matrix. Weights
are held by `hold`. Positions are known of traced models; elsewhere channels are grouped. A map is what a softmax module gives to a site
behind it; it is rounded where queries and keys come from different inputs, to the bits of that site's inputs. Tables stay `hold`'s.
Sibling: quantize.round.inputs (a scale for each token, found as it comes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Feeding, Packed, below, restore
from laconic.core.part import Part, Rounding
from laconic.core.site import Embedding, Linear, Site
from laconic.core.statistic import Extremes
from laconic.core.transform import Change, Stats, Transform, at_level
from laconic.kernels.grids import Grid
from laconic.kernels.ranges import Spans, apart, clustered, ends_of, steps_of

CARD = Card(Paper("Ryu et al.", 2025, "arXiv:2501.04304", "section 4"), catalogue="dgq", sibling="quantize.round.inputs")

Axis = Literal["channels", "positions"]


class Spanned(Feeding):
    """`inner`, whose products round their inputs x (..., m) by groups of an axis. index (max(m, t),), filled up with zeros; scale and zero
    (g,)."""

    form = "quantize.round.dgq.Spanned"
    index: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, inner: Packed, bits: int, axis: Axis, length: int, index: Tensor, scale: Tensor, zero: Tensor) -> None:
        super().__init__(inner)
        self.bits, self.axis, self.length = bits, axis, length
        self.register_buffer("index", index)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @property
    def feed(self) -> Callable[[Tensor], Tensor]:
        return Spans(self.bits, self.axis, self.index[: self.length].clone(), self.scale.clone(), self.zero.clone())

    def over(self, inner: Packed) -> Spanned:
        return Spanned(inner, self.bits, self.axis, self.length, self.index, self.scale, self.zero)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "bits": self.bits, "axis": self.axis, "length": self.length, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        inner = restore(described["inner"], below(tensors, "inner"))
        bits, axis, length = (described[name] for name in ("bits", "axis", "length"))
        return cls(inner, bits, axis, length, tensors["index"], tensors["scale"], tensors["zero"])


class Powers(Rounding):
    """In the place of a softmax over the last axis of scores (b, h, t, s): the first key's share as it is, the others' powers of a half
    times the greatest of them."""

    part = "quantize.round.dgq.Powers"

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, scores: Tensor) -> Tensor:
        return apart(scores.softmax(-1), self.bits)

    def exact(self) -> Part:
        return Exactly()

    def describe(self) -> dict[str, Any]:
        return {"part": self.part, "bits": self.bits}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["bits"])


class Exactly(Rounding):
    """The softmax itself."""

    part = "quantize.round.dgq.Exactly"

    def forward(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def describe(self) -> dict[str, Any]:
        return {"part": self.part}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls()


def widest(channels: Tensor, positions: Tensor) -> Axis:
    """Of ends (2, m) and (2, t), the axis along which they deviate most: the sum of the standard deviations of least and greatest."""
    spreads = [float(ends.std(1, correction=0).sum()) if ends.shape[1] else -1.0 for ends in (channels, positions)]
    return "positions" if spreads[1] > spreads[0] else "channels"


def spanned(inner: Packed, ends: Tensor, level: GroupedInputs, index: Callable[[Tensor, int], Tensor] = clustered) -> Spanned:
    """A form with the groups that ends (2, m + t) fall into; index: pairs (n, 2) and how many groups -> group of each (n,)."""
    m = inner.matrix[1]
    channels, positions = ends[:, :m], ends[:, m:]
    axis = widest(channels, positions)
    low, high = channels if axis == "channels" else positions
    at = index(torch.stack([low, high], 1), level.groups)
    scale, zero = steps_of(*ends_of(low, high, at, level.groups), level.inputs)
    whole = torch.zeros(max(m, positions.shape[1]), dtype=torch.uint8)
    whole[: len(at)] = at.to(torch.uint8)
    return Spanned(inner, level.inputs, axis, len(at), whole, scale, zero)


@dataclass(frozen=True)
class GroupedInputs:
    """Level: the grid of the weights, the bits of what they are multiplied with, and groups of that, 8 or 16 in the paper."""

    weight: Grid
    inputs: int = 8
    groups: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.inputs <= 8:
            raise ValueError(f"inputs={self.inputs}: inputs have 2 to 8 bits")
        if not 1 <= self.groups <= 256:
            raise ValueError(f"groups={self.groups}: there are 1 to 256 groups")


@dataclass(frozen=True)
class DGQ(Transform):
    """hold: how the weights are held. maps: round attention over another sequence too."""

    hold: Transform
    maps: bool = True

    acts_on = (Linear, Embedding)
    level = GroupedInputs

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        """What the weights' method wants, and the ends of inputs."""
        return (*self.hold.wants, Extremes())

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: GroupedInputs) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[GroupedInputs]) -> Iterator[Change]:
        """The weights' method at all levels together."""
        for level, change in zip(levels, self.hold.several(site, weights, stats, [level.weight for level in levels]), strict=True):
            if isinstance(site.kind, Embedding):
                yield change
                continue
            held = {tensor: spanned(form, stats[Extremes()], level) for tensor, form in change.hold.items()}
            place: dict[str, nn.Module] = {}
            if self.maps and (found := site.context.get("map")) is not None and found.crossed:
                place[found.path] = Powers(level.inputs)
            yield Change(hold=held, place=place, notes=change.notes)

    def stored(self, site: Site, level: GroupedInputs) -> int:
        size = self.hold.stored(site, at_level(self.hold, level.weight))
        if isinstance(site.kind, Embedding):
            return size
        return size + max(site.matrix[1], int(site.context.get("positions", 1))) + 8 * level.groups
