"""What runs for some inputs and not for others: a Router says where Routed parts stand and how they learn; a Routed part runs a share of
what it stands around, input by input, and counts it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from laconic.core.packed import Packed
from laconic.core.part import Part
from laconic.core.site import Anatomy, Kind, Site
from laconic.core.transform import Change, Lesson


class Load(NamedTuple):
    """Multiplications with weights for one input (a token, an image): of the whole without routing, on average over what was seen, and at
    most, whatever the input; routers' own included in the last two."""

    dense: float
    expected: float
    worst: float

    def plus(self, other: Load) -> Load:
        """Of two things that both run."""
        return Load(*(a + b for a, b in zip(self, other, strict=True)))


class Skips(NamedTuple):
    """What a Routed part does to one token, as a kernel takes it: entries of a = x, or of a = silu(gate x), that are below their threshold
    count as none, and out is the sum over the others of a_j down[:, j], or of a_j (up_j x) down[:, j].

    least (1,) or (h,); down (n, h) and up (h, m), matrices as they are held; gate: the module of that name."""

    least: Tensor
    down: Tensor
    up: Tensor | None = None
    gate: nn.Module | None = None


class Routed(Part):
    """Stands where a module was, which it takes in by `around`: that one's tensors keep their names, and the part's own lie below the same
    path, so all are stored, read and filled as those of any module.

    run: `gathered`, what is not asked for is not computed; `masked`, all is computed and what is not asked for dropped, the same to
    rounding; `learning`, masked, and the router's error against its labels is kept for `penalty`. asks: who says what runs, the `router`,
    its `labels` (what it learns to say, made from what all of it computes), or nobody (`all`: the module as it was).

    looks: how often a part that learns nothing by steps wants to see the calibration data, all of it running (`looking`). alone: things are
    left out only for tokens that come one at a time, as in generation, which is what is counted; more are computed whole and masked."""

    looks: ClassVar[int] = 0
    alone: ClassVar[bool] = False
    run: Literal["gathered", "masked", "learning", "looking"] = "gathered"
    asks: Literal["router", "labels", "all"] = "router"

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.error: Tensor | None = None
        self.spent = Load(0.0, 0.0, 0.0)

    @abstractmethod
    def around(self, path: str, model: nn.Module) -> None:
        """Takes in the module at `path` of the model that the part is about to be put into; its tensors may be on meta."""

    def fits(self, path: str, model: nn.Module) -> bool:
        """Whether the module at `path` can be run in parts at all, found by trying; it may be on meta."""
        return True

    def begin(self, generator: torch.Generator) -> None:
        """Values of the part's own parameters, in place of none, before it learns."""

    def remember(self) -> None:
        """What learning needs of the module as it is now."""

    def looked(self) -> None:
        """Called after each look."""

    def skips(self) -> Skips | None:
        """What it does to one token, where that is no more than to leave out what is small."""
        return None

    def penalty(self, done: float) -> Tensor | None:
        """What the last pass adds to the objective once the share `done` of the steps is behind it; None where the router stays."""
        return None

    def count(self, rows: int, dense: float, spent: float, worst: float) -> None:
        """Each pass says what it came to, summed over so many inputs."""
        self.seen += rows
        self.spent = self.spent.plus(Load(dense, spent, worst))

    def forget(self) -> None:
        """Counting begins anew."""
        self.seen, self.spent = 0, Load(0.0, 0.0, 0.0)

    @property
    def load(self) -> Load:
        """For one input, over all since counting began."""
        return Load(*(value / max(self.seen, 1) for value in self.spent))


class Settling(Routed):
    """A part that holds weights in another form once it has learned."""

    @abstractmethod
    def settle(self) -> dict[str, Packed]:
        """Called once, when learning is over: the forms of weights of what it stands around, by their names below it, which are stored in
        their place. What is its own it exchanges itself."""

    @abstractmethod
    def settled(self) -> dict[str, int]:
        """The bytes of those forms, by the same names, and under "" of all that is its own: known before anything has learned."""


@contextmanager
def asking(parts: Iterable[Routed], run: Any, asks: Any) -> Iterator[None]:
    """Inside, parts run so and are told so."""
    before = [(part, part.run, part.asks) for part in parts]
    for part, _, _ in before:
        part.run, part.asks = run, asks
    try:
        yield
    finally:
        for part, was, asked in before:
            part.run, part.asks = was, asked


class Router(ABC):
    """Where a model is routed, and how that is learned. acts_on: the kinds of its sites; learns: the parts with what they stand around, or
    the whole model, norms' statistics included."""

    acts_on: ClassVar[tuple[type[Kind], ...]]
    learns: ClassVar[Literal["parts", "model"]]

    @property
    @abstractmethod
    def lesson(self) -> Lesson | None:
        """How; the objective is against the original's predictions. None: parts only look at calibration data."""

    @abstractmethod
    def place(self, site: Site, anatomy: Anatomy) -> Change:
        """The Routed part for a site, own parameters on meta, in `Change.place`; nothing where the site is not for it, with a note why.
        context: beside what the anatomy says, `rectified` where only what is positive of the site's output (behind its norm) counts.
        UserError where the knobs do not fit."""
