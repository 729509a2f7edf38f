"""A Part stands where a module of the model was: what a Change places, stored as a few words beside the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from laconic.core.packed import stored_class


class Part(nn.Module, ABC):
    """A module that takes another's place and is called as that one was. It holds no tensors, unless it is Routed. Stored parts are named
    by their module path below `laconic.methods`."""

    part: ClassVar[str]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is needed to build it again, `part` included: a JSON object."""

    @classmethod
    @abstractmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        """The part again, from `describe()`."""


def restore_part(described: Mapping[str, Any]) -> Part:
    """Any stored part again, by the path in `described["part"]`."""
    found: type[Part] = stored_class(str(described["part"]))
    return found.restore(described)
