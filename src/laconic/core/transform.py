"""A Transform proposes, never touches: it returns a Change, the edit as a value that can be stored, compared and undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from laconic.core.packed import Packed
from laconic.core.part import Part
from laconic.core.site import Group, Kind, Site, TensorId
from laconic.core.statistic import Statistic

# a level is a frozen dataclass of the method's own (bits and group, rank, sparsity): how far to go
Level = Any
Stats = Mapping[Statistic, Tensor]


class Objective(ABC):
    """What a Lesson makes small, and what a Judge measures; `unit` is that of its values."""

    unit: ClassVar[str] = "nats/token"

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """A scalar loss."""


@dataclass(frozen=True)
class Lesson(ABC):
    """What is to be learned, run only by pipeline.tune: the objective is brought down over calibration inputs. `rates`: (name, learning
    rate) of parameters of the Soft forms; one that is not named stays as it is. A step sees `batch` calibration sequences."""

    objective: Objective
    rates: tuple[tuple[str, float], ...]
    steps: int
    batch: int = 8
    optimiser: Literal["adam", "signed"] = "adam"
    decay: Literal["constant", "linear", "cosine"] = "linear"


@dataclass(frozen=True)
class Change:
    """The edit. hold: a stored tensor now held so; fold: exact new values of other tensors; cut: kept indices of a coupled group;
    place: runtime parts by module path; notes: sentences for the log (dead columns, added damping)."""

    hold: Mapping[TensorId, Packed] = field(default_factory=dict)
    fold: Mapping[TensorId, Tensor] = field(default_factory=dict)
    cut: Mapping[int, tuple[Group, tuple[int, ...]]] = field(default_factory=dict)
    place: Mapping[str, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Transform(ABC):
    """One way to change one site. Knobs are fields of a frozen dataclass; how far to go is the `level` argument."""

    acts_on: tuple[type[Kind], ...]
    level: type
    wants: tuple[Statistic, ...] = ()
    exact: bool = False

    @abstractmethod
    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Level) -> Change:
        """weights: the site's tensors by role, fp32 or as stored; they are not written to. stats: what `wants` asked for."""

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Level]) -> Iterator[Change]:
        """One Change for each level, in order. A method that can share work between levels does so here; the results are the same."""
        for level in levels:
            yield self(site, weights, stats, level)

    @abstractmethod
    def stored(self, site: Site, level: Level) -> int:
        """Bytes that the Change at this level will hold for the site, known without doing the work; a law compares it with the Change."""
