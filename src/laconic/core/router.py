"""What runs for some inputs and not for others: a Router says where Routed parts stand and how they learn; a Routed part runs a share of
what it stands around, input by input, and counts it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

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


class Routed(Part):
    """Stands where a module was, which it takes in by `around`: that one's tensors keep their names, and the part's own lie below the same
    path, so all are stored, read and filled as those of any module.

    run: `gathered`, what is not asked for is not computed; `masked`, all is computed and what is not asked for dropped, the same to
    rounding; `learning`, masked, and the router's error against its labels is kept for `penalty`. asks: who says what runs, the `router`,
    its `labels` (what it learns to say, made from what all of it computes), or nobody (`all`: the module as it was)."""

    run: Literal["gathered", "masked", "learning"] = "gathered"
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


class Router(ABC):
    """Where a model is routed, and how that is learned. acts_on: the kinds of its sites; learns: the parts with what they stand around, or
    the whole model, norms' statistics included."""

    acts_on: ClassVar[tuple[type[Kind], ...]]
    learns: ClassVar[Literal["parts", "model"]]

    @property
    @abstractmethod
    def lesson(self) -> Lesson:
        """How; the objective is against the original's predictions."""

    @abstractmethod
    def place(self, site: Site, anatomy: Anatomy) -> Change:
        """The Routed part for a site, own parameters on meta, in `Change.place`; nothing where the site is not for it, with a note why.
        context: beside what the anatomy says, `rectified` where only what is positive of the site's output (behind its norm) counts.
        UserError where the knobs do not fit."""
