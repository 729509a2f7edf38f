"""A sub-layer is taken out and the residual stream passes through. Zhang et al. 2024 (FinerCut), arXiv:2405.18218, section 3.1.

x + f(norm(x)) becomes x for f an attention or a feed-forward sub-layer. Everything that it stores goes, norms that nothing else reads
included: 0 bytes. What runs in its place gives zeros; of an attention it also tells the KV cache how many tokens went by, in keys of
width 0, so that positions and masks stay right in no bytes. Which ones go is for a search to say. One level, `Gone`.
Sibling: prune.cut.drop (single weights)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Absent
from laconic.core.part import Part
from laconic.core.site import Site, Sublayer
from laconic.core.transform import Change, Stats, Transform

CARD = Card(Paper("Zhang et al.", 2024, "arXiv:2405.18218", "section 3.1"), catalogue="", sibling="prune.cut.drop")


@dataclass(frozen=True)
class Gone:
    """The one level: all of it."""


@dataclass(frozen=True)
class DropSublayer(Transform):
    """Nothing of the sub-layer stays."""

    acts_on = (Sublayer,)
    level = Gone

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Gone) -> Change:
        attends = site.roles.get("part") == "attention"
        place: dict[str, Part] = {name: Passed() for name in site.context.get("norms", ())}
        place[site.name] = Skipped(site.context.get("outputs", 0), site.context["layer"] if attends else None)
        return Change(hold={site.tensors[role]: Absent(weight.shape) for role, weight in weights.items()}, place=place)

    def stored(self, site: Site, level: Gone) -> int:
        return 0


class Skipped(Part):
    """Stands for a sub-layer: zeros as wide as its input x (b, t, d). outputs: how many values the sub-layer gave, 0 for the output itself;
    layer: its number in the KV cache, None where it has no part in it."""

    part = "prune.cut.sublayer.Skipped"

    def __init__(self, outputs: int, layer: int | None) -> None:
        super().__init__()
        self.outputs, self.layer = outputs, layer

    def forward(self, *args: Any, hidden_states: Tensor | None = None, **kwargs: Any) -> Any:
        x: Tensor = args[0] if hidden_states is None else hidden_states
        # architectures call their cache by several names
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        if cache is not None and self.layer is not None:
            none = x.new_zeros(x.shape[0], 1, x.shape[1], 0)
            cache.update(none, none, self.layer)
        out = torch.zeros_like(x)
        return (out, *[None] * (self.outputs - 1)) if self.outputs else out

    def describe(self) -> dict[str, Any]:
        return {"part": self.part, "outputs": self.outputs, "layer": self.layer}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls(described["outputs"], described["layer"])


class Passed(Part):
    """Stands for a norm that nothing reads any more."""

    part = "prune.cut.sublayer.Passed"

    def forward(self, x: Tensor) -> Tensor:
        return x

    def describe(self) -> dict[str, Any]:
        return {"part": self.part}

    @classmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        return cls()
