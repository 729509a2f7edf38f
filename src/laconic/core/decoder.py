"""How tokens are drawn: a Decoder over a Stack, which is what a model looks like to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from laconic.core.transform import Change, Lesson


@dataclass(frozen=True)
class Draw:
    """How a token is taken from logits: the likeliest at temperature 0, of equals the first; else drawn. Greedy is drawing from a
    distribution with all of its weight on one token, so that what is lossless for one is lossless for the other."""

    temperature: float = 0.0
    generator: torch.Generator | None = None

    def odds(self, logits: Tensor) -> Tensor:
        """logits (..., v) -> the distribution that a token is taken from, fp32."""
        if self.temperature > 0:
            return (logits.float() / self.temperature).softmax(-1)
        return torch.zeros(logits.shape, device=logits.device).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)

    def pick(self, odds: Tensor) -> int:
        """odds (v,) -> a token."""
        if self.temperature > 0:
            return int(torch.multinomial(odds, 1, generator=self.generator))
        return int(odds.argmax())

    def happens(self, chance: float) -> bool:
        """True with this chance; nothing is drawn where it is certain."""
        if chance >= 1 or chance <= 0:
            return chance >= 1
        return float(torch.rand((), generator=self.generator)) < chance


class Body(NamedTuple):
    """The measures of a model that parts beside it are cut to."""

    depth: int
    width: int
    heads: int


class Answer(NamedTuple):
    """logits (b, t, v) of the whole model; hidden (b, t, d): what its head read."""

    logits: Tensor
    hidden: Tensor


class Stack(ABC):
    """A model as a Decoder runs it: equal layers over a State. All that is computed is pending until `settle` says how much of it stays;
    what does not stay leaves no trace. Whoever goes on from hidden states of his own computes nothing twice.

    length: settled tokens of a row; parts: what was placed beside the model, by path. layer_passes, part_passes: how often a layer of the
    model, or a part's attention, was run, over however many tokens."""

    length: int
    parts: Mapping[str, nn.Module]
    layer_passes: int
    part_passes: int

    @abstractmethod
    def rise(self, tokens: Tensor, last: int) -> Tensor:
        """The next tokens (b, t) through embedding and layers 0 to last - 1 -> hidden states (b, t, d)."""

    @abstractmethod
    def answer(self, tokens: Tensor, hidden: Tensor | None = None, first: int = 0, keep: int | None = None) -> Answer:
        """The next tokens (b, t) through layers `first` to the last and the head; hidden (b, t, d): where `rise` left them. keep: of so
        many last tokens is an answer wanted (None: of all)."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """The model's own head alone: hidden (..., d) -> logits (..., v)."""

    @abstractmethod
    def mix(self, part: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of a placed part over all it has seen, in the same State as the model's: each (b, heads, t, d) of its next tokens."""

    @abstractmethod
    def settle(self, count: int) -> None:
        """Of the pending tokens the first `count` stay, in every layer that has run them; the others are taken back."""

    @abstractmethod
    def fork(self, index: Tensor) -> None:
        """Rows by index, as a beam needs; nothing may be pending."""


class Round(NamedTuple):
    """What one pass through the whole model brought: tokens (b, n) that stand, and how many were drafted for it and accepted."""

    tokens: Tensor
    drafted: int = 0
    accepted: int = 0


class Decoder(ABC):
    """How tokens are drawn. Laws of the lossless ones: at temperature 0 the same tokens as one by one, else the same distribution.

    A decoder that needs something beside the model places it (`place`) and says how it learns (`lesson`, `tap`, `taught`): the hidden
    states after `tap` layers go into `taught`, whose logits are brought to those of the whole model."""

    lossless: ClassVar[bool]
    tap: int = 0

    @property
    def lesson(self) -> Lesson | None:
        """How what it places is learned; None where there is nothing to learn."""
        return None

    def place(self, body: Body, generator: torch.Generator | None) -> Change:
        """The parts it needs beside the model, in `Change.place`, as they begin; without a generator on meta, for their sizes. UserError
        where they do not fit the model."""
        return Change()

    def taught(self, parts: Mapping[str, nn.Module], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """hidden (b, t, d) after `tap` layers of whole texts -> logits (b, t, v)."""
        raise NotImplementedError(f"{type(self).__name__} places nothing")

    @abstractmethod
    def __call__(self, stack: Stack, prompt: Tensor, *, limit: int, draw: Draw, ends: frozenset[int] = frozenset()) -> Iterator[Round]:
        """prompt (b, t) -> at most `limit` new tokens a row, nothing after an end. UserError for a batch that it cannot decode."""
