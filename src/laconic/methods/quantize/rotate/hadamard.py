"""Online Hadamard rotation: inputs are spread over all channels before the product, and the weights hold the inverse.

Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4: before an output projection no matrix can take a rotation in, so
y = (W H)(H^T x),  H orthonormal with entries +-1 / sqrt(m).  weight (n, m) -> W H, held by `hold` (rounded, inputs too); x is turned as it
comes, in m log2 m additions, and nothing is stored for it. Any m: `kernels.hadamard`. Grams that `hold` wants are turned with the inputs.
Sibling: quantize.rotate.mambaquant (turns what can be turned without a cost when the model runs)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft, Way, below, restore
from laconic.core.site import Linear, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Level, Stats, Transform
from laconic.kernels.hadamard import hadamard, unhadamard

CARD = Card(Paper("Ashkboos et al.", 2024, "arXiv:2404.00456", "section 4"), catalogue="", sibling="quantize.rotate.mambaquant")


Feed = Callable[[Tensor], Tensor]


def turned(feed: Feed | None) -> Feed | None:
    """What becomes of inputs where it is done between a rotation and back."""
    return None if feed is None else lambda x: unhadamard(feed(hadamard(x)))


class Rotated(Packed):
    """W as W H, which `inner` holds: inputs are turned by H before its product."""

    form = "quantize.rotate.hadamard.Rotated"

    def __init__(self, inner: Packed) -> None:
        super().__init__()
        self.inner, self.shape = inner, inner.shape

    @property
    def feed(self) -> Feed | None:
        return turned(self.inner.feed)

    def dense(self) -> Tensor:
        return unhadamard(self.inner.dense())

    def rows(self, index: Tensor | slice) -> Tensor:
        return unhadamard(self.inner.rows(index))

    def matmul(self, x: Tensor) -> Tensor:
        return self.inner.matmul(hadamard(x))

    def round_inputs(self, bits: int) -> bool:
        return self.inner.round_inputs(bits)

    @property
    def parts(self) -> int:
        return self.inner.parts

    def first(self, count: int) -> Rotated:
        return Rotated(self.inner.first(count))

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        soft = self.inner.soften(hadamard(target), way)
        return None if soft is None else SoftRotated(soft)

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(restore(described["inner"], below(tensors, "inner")))


class SoftRotated(Soft):
    """A Rotated whose inner form is learned."""

    def __init__(self, inner: Soft) -> None:
        super().__init__()
        self.inner, self.shape = inner, inner.shape

    @property
    def feed(self) -> Feed | None:
        return turned(self.inner.feed)

    def dense(self) -> Tensor:
        return unhadamard(self.inner.dense())

    def harden(self) -> Rotated:
        return Rotated(self.inner.harden())


@dataclass(frozen=True)
class Hadamard(Transform):
    """hold: how the turned weights are held; its levels are those of this method."""

    hold: Transform

    acts_on = (Linear,)

    def __post_init__(self) -> None:
        if others := [type(kind).__name__ for kind in self.hold.wants if not isinstance(kind, Gram)]:
            raise ValueError(f"hold wants {', '.join(others)} of its inputs, which is not known of turned ones; hold with another method")

    @property
    def level(self) -> type:  # type: ignore[override]
        """The levels of `hold`."""
        return self.hold.level

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        """What `hold` wants."""
        return self.hold.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Level) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Level]) -> Iterator[Change]:
        """The weights' method at all levels together."""
        turned = {role: hadamard(weight.float()) if role == "weight" else weight for role, weight in weights.items()}
        # H^T G H: rows, then columns
        seen = {kind: hadamard(hadamard(value).T) if isinstance(kind, Gram) else value for kind, value in stats.items()}
        for change in self.hold.several(site, turned, seen, levels):
            yield Change(hold={tensor: Rotated(form) for tensor, form in change.hold.items()}, notes=change.notes)

    def stored(self, site: Site, level: Level) -> int:
        return self.hold.stored(site, level)
