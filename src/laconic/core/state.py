"""What is carried between tokens, and how tokens mix, are routed and drawn. Roles only: the families bring the first of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class State(ABC):
    """KV pages, a state-space state, a convolution window. Law: tokens that were not committed leave no trace."""

    nbytes: int

    @abstractmethod
    def append(self, layer: int, new: Any, positions: Tensor, mask: Tensor | None) -> Any:
        """Stage new tokens of one layer; they count only once committed. Returns what attention may read now."""

    @abstractmethod
    def commit(self, count: Tensor) -> None:
        """Keep the first count[b] staged tokens of each row of the batch, forget the rest."""

    @abstractmethod
    def attend(self, query: Tensor, layer: int, mask: Tensor | None) -> Tensor:
        """Attention over what is held."""

    @abstractmethod
    def fork(self, index: Tensor) -> State:
        """An independent copy with rows picked by index."""

    @abstractmethod
    def mark(self) -> Any:
        """A point to come back to."""

    @abstractmethod
    def restore(self, mark: Any) -> None:
        """Back to a mark."""


class Mixer(ABC):
    """How tokens mix. Law: parallel = chunked = recurrent."""

    @abstractmethod
    def __call__(self, x: Tensor, state: State | None, mask: Tensor | None) -> Tensor:
        """x (b, t, d) -> (b, t, d)."""


class Router(ABC):
    """Where tokens go. Law: full capacity = dense."""

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (t, d) -> expert indices (t, k) and weights (t, k)."""


class Decoder(ABC):
    """How tokens are drawn. Law of the lossless ones: the distribution is kept."""

    lossless: bool

    @abstractmethod
    def __call__(self, model: Any, prompt: Tensor, *, limit: int, generator: Any) -> Tensor:
        """prompt (b, t) -> (b, t + new)."""


class Codec(ABC):
    """What is stored or sent. Law: lossless ones are exact, lossy ones stay within their bound."""

    lossless: bool

    @abstractmethod
    def encode(self, value: Tensor) -> bytes:
        """The stored bytes."""

    @abstractmethod
    def decode(self, stored: bytes) -> Tensor:
        """The value again."""
