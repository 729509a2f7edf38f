"""A Part stands where a module of the model was: what a Change places, stored as a few words beside the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from laconic.core.packed import stored_class


class Part(nn.Module, ABC):
    """A module that takes another's place and is called as that one was. What it needs of that one it takes over, under the same names;
    what it holds besides are buffers, or, where it is Routed, tensors that are learned, stored as the model's own are. Stored parts are
    named by their module path below `laconic.methods`."""

    part: ClassVar[str]

    def over(self, module: nn.Module) -> None:
        """Called once, before it takes the place of `module`: children and parameters that it goes on using become its own."""
        return

    def exact(self) -> Part:
        """The part with nothing rounded, not yet in its place; itself where it rounds nothing."""
        return self

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is needed to build it again, `part` included: a JSON object."""

    @classmethod
    @abstractmethod
    def restore(cls, described: Mapping[str, Any]) -> Self:
        """The part again, from `describe()`; buffers come with the model's tensors."""


def adopt(part: nn.Module, layer: nn.Module) -> None:
    """Children and parameters of a layer become a part's own too, under their names."""
    for name, child in layer.named_children():
        part.add_module(name, child)
    for leaf, parameter in layer.named_parameters(recurse=False):
        part.register_parameter(leaf, parameter)


class Rounding(Part):
    """A part without tensors, in the place of a module without tensors (a softmax), that computes what that one did and rounds it. It
    stands in the model from the moment that it is placed, so that whatever comes later sees what it does."""


def restore_part(described: Mapping[str, Any]) -> Part:
    """Any stored part again, by the path in `described["part"]`."""
    found: type[Part] = stored_class(str(described["part"]))
    return found.restore(described)
