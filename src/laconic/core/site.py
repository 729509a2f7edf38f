"""What a model is made of. A Site is a place where a method may act; an Anatomy lists the sites of one model and how they hang together.

Kinds are types, not strings: a method says `acts_on = (Linear, Conv)` and is offered those sites only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

A = TypeVar("A", bound="Act")


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
class Norm(Kind):
    """The scale (and shift) of a norm, weight (d,). Named by groups and edges, never offered to a method by itself.

    context: `plus` is what the norm adds to its stored scale, `centred` whether it takes the mean away first."""


@dataclass(frozen=True)
class Scan(Kind):
    """What a state-space scan holds for each of its channels or heads, weight (n, ...). Named by groups and edges only."""


@dataclass(frozen=True)
class Experts(Kind):
    """The experts of one layer together; each matrix of each expert is a Linear site of its own."""


@dataclass(frozen=True)
class Heads(Kind):
    """The attention heads of one layer."""


@dataclass(frozen=True)
class Sublayer(Kind):
    """An attention or feed-forward sub-layer with its residual connection. `tensors` are all that it stores, the norms that nothing else
    reads included, by parameter; `shape` is (how many numbers these are,).

    context: `norms` are the module paths of its norms, `writers` the sites that write its output, `outputs` how many values its module
    returns (0: the output itself), `layer` its number."""


@dataclass(frozen=True)
class Layer(Kind):
    """A whole block of the stack."""


@dataclass(frozen=True)
class Cache(Kind):
    """What one layer carries between tokens."""


@dataclass(frozen=True)
class Examples(Kind):
    """Documents of a pool by their features: a matrix (documents, features) that no model stores."""


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
    need (heads, groups, stride). `transposed`: the weight is stored as (m, n), and `shape` is (n, m) all the same."""

    name: str
    kind: Kind
    tensors: Mapping[str, TensorId]
    shape: tuple[int, ...]
    roles: Mapping[str, str] = {}
    context: Mapping[str, Any] = {}
    transposed: bool = False

    @property
    def covers(self) -> frozenset[str]:
        """The stored tensors that a choice at this place settles."""
        return frozenset(t.name for t in (self.tensors.values() if isinstance(self.kind, Sublayer) else (self.tensors["weight"],)))

    @property
    def matrix(self) -> tuple[int, int]:
        """(n, m) of the matrix view: the first axis against all others."""
        width = 1
        for size in self.shape[1:]:
            width *= size
        return self.shape[0], width


class Map(NamedTuple):
    """A softmax module between sites, shares of keys for each query: its path, and whether queries and keys come from different inputs."""

    path: str
    crossed: bool


@dataclass(frozen=True)
class IndexMap:
    """Which of the `width` indices of one member's axis fall together with index i of a group's canonical axis: the `block` of them from
    i * block + offset on, as far as the axis has them (a padded shortcut is narrower than its stream), or what `table` lists for i, where
    an order needs it (several slices of one fused tensor, interleaved heads)."""

    width: int
    offset: int = 0
    block: int = 1
    table: tuple[tuple[int, ...], ...] | None = None

    def __call__(self, i: int) -> Sequence[int]:
        """The member's indices that fall together with canonical index i; none where the member is narrower."""
        if self.table is not None:
            return self.table[i]
        start = self.offset + i * self.block
        return range(max(start, 0), max(min(start + self.block, self.width), 0))


@dataclass(frozen=True)
class Member:
    """A slice set of one site along one axis (0 = out, 1 = in; of a table 0 = rows, 1 = columns) and how it maps to the group's canonical
    axis. A bias, which has one entry for each output, goes with axis 0. No site is twice in one group with the same axis."""

    site: Site
    axis: int
    index: IndexMap

    @property
    def stored_axis(self) -> int:
        """The axis of the stored weight."""
        return 1 - self.axis if self.site.transposed else self.axis

    @property
    def reads(self) -> bool:
        """Whether the slices are what a matrix takes in: without them, and without them alone, it computes as if they were gone."""
        return self.axis == 1 and isinstance(self.site.kind, Linear | Conv)

    def slices(self, indices: Sequence[int]) -> list[int]:
        """The member's own indices, in order, that fall with these canonical ones."""
        return sorted(j for i in indices for j in self.index(i))


class Group(NamedTuple):
    """Slices that must fall together; removing canonical index i removes `member.index(i)` from every member. `fixed`: they are the
    model's own inputs or outputs (pixels, classes, the vocabulary), which stay."""

    width: int
    members: tuple[Member, ...]
    fixed: bool = False


@dataclass(frozen=True)
class Act:
    """An exact edit that an edge may allow. Subclasses are final."""


@dataclass(frozen=True)
class Scale(Act):
    """A factor for each channel at the writers and its inverse at the readers; `positive`: only factors above zero (a rectifier lies
    between)."""

    positive: bool = False


@dataclass(frozen=True)
class Rotate(Act):
    """Any orthogonal matrix, once the norms of the edge are folded. `keeps_ones`: only those that leave the vector of ones where it is,
    since a norm takes the mean away."""

    keeps_ones: bool = False


@dataclass(frozen=True)
class Gated(Act):
    """A factor above zero for each channel at the writers of a gate, and its inverse at the readers behind it, where a Part stands at
    `module` whose buffer `gate_scale` puts the factor right within the gate's activation."""

    module: str


@dataclass(frozen=True)
class Paired(Act):
    """A factor above zero for each channel at the writers (keys) and its inverse at the readers (queries), before positions turn channel i
    of a block and channel i + half into one another: these two have the same. Channels from 2 half on are not turned."""

    half: int


class Fold(NamedTuple):
    """A norm on an edge and the readers that take in its scale; `readers` is empty where it can go into none (a norm between a writer
    and the stream, a norm whose output goes on in the stream, a tied head)."""

    norm: Site
    readers: tuple[Member, ...]


@dataclass(frozen=True)
class Edge:
    """Writers and readers of one stream of `width` channels and the exact edits that may act on it, within runs of `block` channels
    (the entries of one head; the whole width otherwise). Biases of writers and shifts of norms are written to the stream too. `operands`:
    where a Part shows what meets of it in a product without weights, the writers' side first."""

    name: str
    width: int
    block: int
    writers: tuple[Member, ...]
    readers: tuple[Member, ...]
    folds: tuple[Fold, ...] = ()
    allows: tuple[Act, ...] = ()
    operands: tuple[Site, ...] = ()

    def may(self, act: type[A]) -> A | None:
        """How the edge allows an act, None where it does not."""
        return next((found for found in self.allows if isinstance(found, act)), None)


class Stage(NamedTuple):
    """Sites of one segment that see the same input, so one statistic serves them all; stages are in order of execution. `beside`: it sees
    nothing of the stage before it (another expert of the same layer), so one pass may serve both."""

    sites: tuple[Site, ...]
    beside: bool = False


class Segment(NamedTuple):
    """What the walk holds at once: a module path ("" is the whole model), its stages and all stored tensors under it. `gives`: entries of
    the tuple that its module returns, 0 where it returns the hidden state itself."""

    name: str
    stages: tuple[Stage, ...]
    tensors: tuple[str, ...]
    gives: int = 0

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the segment in order of execution."""
        return tuple(site for stage in self.stages for site in stage.sites)


class Anatomy(ABC):
    """Lists what one model is made of. Built once, from a table for the architecture or by tracing; never looks at weights' values."""

    @abstractmethod
    def segments(self) -> tuple[Segment, ...]:
        """What the walk holds one after another. The layers of each stack come in order; stem and head (embedding, last norm) come last as
        one segment named "" when the model has layers; a model without layers is one segment ""."""

    @abstractmethod
    def coupled(self, site: Site, axis: int) -> Group:
        """The slices that must fall together with slices of `site` along `axis` (0 = out, 1 = in)."""

    @abstractmethod
    def edges(self) -> Iterator[Edge]:
        """Streams along which exact edits may act."""

    @abstractmethod
    def uncovered(self) -> tuple[str, ...]:
        """Stored tensors that no site covers (norms, biases, positions, routers): named, kept and counted."""

    def why(self, tensor: str) -> str:
        """In a few words, why no site covers a stored tensor."""
        return "no site covers it"

    def sublayers(self) -> tuple[Site, ...]:
        """Sub-layers that can go as a whole, in order of execution; none where the anatomy does not know any."""
        return ()

    def sites(self, *kinds: type[Kind]) -> Iterator[Site]:
        """All sites that a method may be offered, or those of the given kinds, in order of execution."""
        for segment in self.segments():
            for site in segment.sites:
                if not kinds or isinstance(site.kind, kinds):
                    yield site
