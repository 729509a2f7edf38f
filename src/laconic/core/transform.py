"""A Transform proposes, never touches: it returns a Change, the edit as a value that can be stored, compared and undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.core.packed import Packed, Soft
from laconic.core.part import Part
from laconic.core.site import Edge, Group, Kind, Site, TensorId
from laconic.core.statistic import Statistic

# a level is a frozen dataclass of the method's own (bits and group, rank, sparsity): how far to go
Level = Any
Stats = Mapping[Statistic, Tensor]


class Objective(ABC):
    """What a Lesson makes small, and what a Judge measures; `name` in notes, `unit` of its values."""

    name: ClassVar[str]
    unit: ClassVar[str] = "nats/token"

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """A scalar loss."""


@dataclass(frozen=True)
class Scope:
    """What learns together, and whose output it must meet. Subclasses are final."""


@dataclass(frozen=True)
class Layer(Scope):
    """One matrix after another, each to meet its own layer's output."""


@dataclass(frozen=True)
class Window(Scope):
    """So many neighbouring blocks together, to meet the last one's output; a single one is block reconstruction. `overlap` of them are in
    the next window too, where they go on learning."""

    blocks: int = 1
    overlap: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.blocks:
            raise ValueError(f"blocks={self.blocks}, overlap={self.overlap}: a window has one block or more, and the next one begins later")


@dataclass(frozen=True)
class Model(Scope):
    """All at once, to meet the model's output."""


BLOCK, MODEL = Window(), Model()


@dataclass(frozen=True)
class Lesson(ABC):
    """What is to be learned, run only by pipeline.tune: the objective is brought down over calibration inputs. `rates`: (name, learning
    rate) of parameters of the Soft forms; one that is not named stays as it is. A step sees `batch` calibration sequences.

    Below the whole model, inputs are those that the compressed model before it gives, and `targets` says what the original was given when
    it made what is to be met: its own hidden states (float), the compressed model's (prefix), or one and the other with equal weight."""

    objective: Objective
    rates: tuple[tuple[str, float], ...]
    steps: int
    batch: int = 8
    optimiser: Literal["adam", "signed", "momentum"] = "adam"
    decay: Literal["constant", "linear", "cosine"] = "linear"
    scope: Scope = MODEL
    targets: Literal["float", "prefix", "both"] = "float"
    # whether tensors that no form holds learn too
    entire: ClassVar[bool] = False
    # whether the whole model's products may be in bf16 while it learns, where the processor is faster so
    narrow: ClassVar[bool] = False

    def prefixes(self, parts: int, generator: torch.Generator) -> Sequence[int]:
        """How many parts of what is held in parts (at most `parts`) each pass of a step computes with; by default one pass with all."""
        return (parts,)

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        """A form as this lesson learns it: in the form's own way, unless the lesson has one."""
        return held.soften(target)

    def varied(self, inputs: Tensor, predictions: Callable[[], Iterator[Tensor]], room: int, generator: torch.Generator) -> Tensor:
        """Rows that a lesson over a whole language model adds to the calibration tokens (count, length) before it begins, at most `room`;
        none by default. predictions(): the original's logits for what is there, some rows at a time."""
        return inputs[:0]


@dataclass(frozen=True)
class Move:
    """What becomes of what flows along an edge, done at the writers and undone at the readers. Subclasses are final."""


@dataclass(frozen=True)
class Turned(Move):
    """x becomes x R once the norms of the edge are folded; matrix R (width, width) is orthogonal."""

    matrix: Tensor


@dataclass(frozen=True)
class Stretched(Move):
    """Channel i times factors[i]; factors (width,)."""

    factors: Tensor


@dataclass(frozen=True)
class Change:
    """The edit. hold: a stored tensor now held so; fold: new values of other tensors; cut: groups and the indices that they keep;
    move: along which edge; place: modules by path, a Part in another's place or one beside the model; notes: sentences for the log (dead
    columns, damping)."""

    hold: Mapping[TensorId, Packed] = field(default_factory=dict)
    fold: Mapping[TensorId, Tensor] = field(default_factory=dict)
    cut: tuple[tuple[Group, tuple[int, ...]], ...] = ()
    move: tuple[tuple[Edge, Move], ...] = ()
    place: Mapping[str, nn.Module] = field(default_factory=dict)
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


def at_level(inner: Transform, level: Level) -> Level:
    """The level of a method inside another one; ValueError where it is not of a kind that the inner one knows."""
    if not isinstance(level, inner.level):
        raise ValueError(
            f"the method inside has levels of its own ({inner.level.__name__}), here is a {type(level).__name__}; name one for these, "
            "such as quantize.round.rtn"
        )
    return level


class Cut(ABC):
    """One way to remove coupled slices: what each is worth, and what becomes of the matrices that read them once some are gone. How many
    go, and out of which group, is not for it to say. Weights are (n, m[, *kernel]) by the site's name, fp32, and are not written to."""

    wants: tuple[Statistic, ...] = ()

    @abstractmethod
    def sites(self, group: Group) -> tuple[Site, ...]:
        """Those of the group's sites whose statistics `worth` wants."""

    @abstractmethod
    def worth(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats]) -> Tensor:
        """(width,) for the group's canonical indices, higher = keep; comparable between groups."""

    @abstractmethod
    def __call__(self, group: Group, weights: Mapping[str, Tensor], stats: Mapping[str, Stats], kept: tuple[int, ...]) -> Change:
        """`cut`: the group with what it keeps; `fold`: new values of those readers among `weights` whose other columns make up for what is
        gone, in the old shape and zero where slices go. All kept: nothing changes. Called for each reader when its statistics are there."""


class Align(ABC):
    """One way to rewrite a model along its edges so that it computes the same and is easier to round. Every edge that its acts allow is
    offered once; what it does there is applied for all of its tensors elsewhere."""

    def opens(self, edge: Edge) -> Mapping[str, Part]:
        """Parts that stand in the model, by path, from before anything is looked at; those of several edges at one path are alike."""
        return {}

    @abstractmethod
    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        """What it wants to see for this edge, of the model with its parts and its norms as they are."""

    @abstractmethod
    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        """`move` along this edge, or nothing. read: a site's weight, (n, m[, *kernel]) in fp32, before any edge has moved; stats: what
        `looks` asked for, by the site's name."""
