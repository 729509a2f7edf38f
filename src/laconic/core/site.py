"""What a model is made of. A Site is a place where a method may act; an Anatomy lists the sites of one model and how they hang together.

Kinds are types, not strings: a method says `acts_on = (Linear, Conv)` and is offered those sites only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Kind:
    """What sort of place a site is. Subclasses are final and carry no data beyond their type."""


@dataclass(frozen=True)
class Linear(Kind):
    """y = W x + b, weight (n, m)."""


@dataclass(frozen=True)
class Conv(Kind):
    """A convolution, weight (n, m / groups, *kernel); its matrix view is (n, m / groups * prod(kernel))."""


@dataclass(frozen=True)
class Embedding(Kind):
    """A table of rows, weight (rows, d); when tied it is also the output head."""


@dataclass(frozen=True)
class Experts(Kind):
    """Fused expert tensors, weight (e, n, m)."""


@dataclass(frozen=True)
class Heads(Kind):
    """The attention heads of one layer."""


@dataclass(frozen=True)
class Sublayer(Kind):
    """An attention or feed-forward sub-layer with its residual connection."""


@dataclass(frozen=True)
class Layer(Kind):
    """A whole block of the stack."""


@dataclass(frozen=True)
class Cache(Kind):
    """What one layer carries between tokens."""


@dataclass(frozen=True)
class Whole(Kind):
    """The model itself."""


class Part(NamedTuple):
    """A slice [start, stop) of a stored tensor along one axis."""

    axis: int
    start: int
    stop: int


class TensorId(NamedTuple):
    """A stored tensor (its name in the checkpoint), or a part of one; counted once, however often it is used (tied weights)."""

    name: str
    part: Part | None = None


class Site(NamedTuple):
    """One place. `name` is the module's path; `tensors` maps a role (weight, bias) to the stored tensor; `shape` is that of the weight.

    `roles` says what the place does in its architecture ({"stream": "reads"}, {"part": "q"}), `context` holds numbers a method may
    need (heads, groups, stride)."""

    name: str
    kind: Kind
    tensors: Mapping[str, TensorId]
    shape: tuple[int, ...]
    roles: Mapping[str, str] = {}
    context: Mapping[str, Any] = {}

    @property
    def matrix(self) -> tuple[int, int]:
        """(n, m) of the matrix view: the first axis against all others."""
        width = 1
        for size in self.shape[1:]:
            width *= size
        return self.shape[0], width


@dataclass(frozen=True)
class IndexMap:
    """How index i of a group's canonical axis meets index j of one member: j = i * step + offset over blocks of `block` indices.

    Identity is IndexMap(). A padded shortcut has an offset, a GQA key head a block that serves `share` query heads."""

    offset: int = 0
    block: int = 1
    share: int = 1

    def __call__(self, i: int) -> range:
        """The member's indices that fall together with canonical index i."""
        start = self.offset + (i // self.share) * self.block
        return range(start, start + self.block)


@dataclass(frozen=True)
class Member:
    """A slice set of one site along one axis (0 = out, 1 = in) and how it maps to the group's canonical axis of `width` indices."""

    site: Site
    axis: int
    index: IndexMap


class Group(NamedTuple):
    """Slices that must fall together; removing canonical index i removes `member.index(i)` from every member."""

    width: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Edge:
    """Writers and readers of one stream: where an exact rotation, scale or fold may act. `norms` are the elementwise scales between."""

    name: str
    width: int
    writers: tuple[Site, ...]
    readers: tuple[Site, ...]
    norms: tuple[TensorId, ...] = ()


class Stage(NamedTuple):
    """Sites of one segment that see the same input, so one statistic serves them all; stages are in order of execution."""

    sites: tuple[Site, ...]


class Segment(NamedTuple):
    """What the walk holds at once: a module path ("" is the whole model), its stages and all stored tensors under it."""

    name: str
    stages: tuple[Stage, ...]
    tensors: tuple[str, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the segment in order of execution."""
        return tuple(site for stage in self.stages for site in stage.sites)


class Anatomy(ABC):
    """Lists what one model is made of. Built once, from a table for the architecture or by tracing; never looks at weights' values."""

    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """What the walk holds one after another. The stack's layers come in order; stem and head (embedding, last norm) come last as one
        segment named "" when the model has layers; a model without layers is one segment ""."""

    @abstractmethod
    def coupled(self, site: Site, axis: int) -> Group:
        """The slices that must fall together with slices of `site` along `axis` (0 = out, 1 = in)."""

    @abstractmethod
    def edges(self) -> Iterator[Edge]:
        """Streams along which exact edits may act."""

    @abstractmethod
    def uncovered(self) -> tuple[str, ...]:
        """Stored tensors that no site covers (norms, biases, positions): named, kept and counted."""

    def sites(self, *kinds: type[Kind]) -> Iterator[Site]:
        """All sites, or those of the given kinds, in order of execution."""
        for segment in self.segments():
            for site in segment.sites:
                if not kinds or isinstance(site.kind, kinds):
                    yield site
