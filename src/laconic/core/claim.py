"""What was promised and what was found. A Card says where a method comes from; a Claim makes one sentence of a paper runnable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class Measurement(NamedTuple):
    """A number that may be printed: value, unit, how many samples, and the half-width or pair of its spread."""

    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None
    spread: float | None = None


class Metric(ABC):
    """A measurement of one model against the original on the same inputs."""

    @abstractmethod
    def __call__(self, original: Tensor, compressed: Tensor, target: Tensor) -> Measurement:
        """Outputs (t, classes) of both models and the true targets (t,)."""


@dataclass(frozen=True)
class Paper:
    """Who, when, where. `link` is an arXiv id (arXiv:2210.17323) or a DOI."""

    authors: str
    year: int
    link: str
    section: str = ""


@dataclass(frozen=True)
class Card:
    """The label of a method; literals only, so that the catalogue reads it without importing. `catalogue` is the row's id or empty."""

    paper: Paper
    catalogue: str
    sibling: str
    exceptions: Mapping[str, str] = field(default_factory=dict)


Result = Literal["holds", "fails", "cannot be checked here"]


class Verdict(NamedTuple):
    """What a claim came to: the result, the numbers it rests on and the number of the broken stand-in, which must fail."""

    result: Result
    numbers: Mapping[str, Measurement]
    reason: str = ""


@dataclass(frozen=True)
class Scale:
    """At which scale a claim was run: model, data, seeds, and the full or the quick setting."""

    model: str
    data: str
    seeds: int
    quick: bool


class Lab(NamedTuple):
    """What a check may use: where the real data lies (None in a fresh clone), quick or full, a log, and a scratch folder; most: of a
    claim's draws at most so many, None for all."""

    data: Any
    quick: bool
    log: Callable[[str], None]
    scratch: Any
    most: int | None = None

    def draws(self, seeds: Sequence[T]) -> Sequence[T]:
        """Those of a claim's draws that this run takes."""
        return seeds[: self.most]


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, runnable. `broken` runs the same check on a stand-in that must fail. timed: whether it rests on times or
    the memory of its process, so that nothing else may run beside it."""

    says: str
    where: Paper
    scale: str
    check: Callable[[Lab], Verdict]
    broken: Callable[[Lab], Verdict]
    timed: bool = False
