"""What is carried between tokens, and how tokens mix and are routed. State has its bookkeeping here, so that a method says only how
committed tokens are kept; Schedule shares the work of attending over them out; Pattern says what a prompt attends to; the others are roles
only: the families bring the first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.errors import UserError

# entries of a page: a token appended costs a copy of at most so many
PAGE = 256


@dataclass(frozen=True)
class Ragged:
    """Rows of unlike length, (b, h, t, ...), of which row i has the first lengths[i] entries along axis 2 (tokens, or groups of them);
    zeros past a row's end. In pages of PAGE entries along that axis, the last as wide as it must be; what was only given, not kept, may be
    one page of any width. Never written to, so that pages may be shared: `join` makes only those again to which something comes."""

    pages: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, data: Tensor, mask: Tensor | None = None) -> Self:
        """mask (b, t): true where a token is one; padding is left out."""
        if mask is None or bool(mask.all()):
            return cls((data,), (data.shape[2],) * data.shape[0])
        lengths = tuple(int(n) for n in mask.sum(1).tolist())
        out = data.new_zeros(*data.shape[:2], max(lengths), *data.shape[3:])
        for i, n in enumerate(lengths):
            out[i, :, :n] = data[i, :, mask[i]]
        return cls((out,), lengths)

    @classmethod
    def kept(cls, data: Tensor, lengths: tuple[int, ...]) -> Self:
        """A copy of `data` in pages, none of which holds anything else in memory."""
        parts = (data[:, :, at : at + PAGE] for at in range(0, max(data.shape[2], 1), PAGE))
        return cls(tuple(part.clone(memory_format=torch.contiguous_format) for part in parts), lengths)

    @property
    def data(self) -> Tensor:
        """All of it in one tensor, a copy where there are several pages."""
        return self.pages[0] if len(self.pages) == 1 else torch.cat(self.pages, 2)

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every page changed, entry by entry."""
        return replace(self, pages=tuple(change(page) for page in self.pages))

    def _even(self) -> bool:
        return len(set(self.lengths)) <= 1

    def join(self, *others: Self) -> Self:
        """Each row followed by those of the others, in pages."""
        if len(self.pages) == 1 and self.pages[0].shape[2] > PAGE:
            return type(self).kept(self.data, self.lengths).join(*others)
        parts = (self, *others)
        lengths = tuple(sum(ends) for ends in zip(*(part.lengths for part in parts), strict=True))
        if all(part._even() for part in parts):
            full = max(self.lengths, default=0) // PAGE
            rest = [page[:, :, : max(part.lengths, default=0)] for part in others for page in [part.data]]
            if full < len(self.pages):
                rest.insert(0, self.pages[full])
            tail = torch.cat(rest, 2)
            if tail.shape[2] <= PAGE:
                last = (tail,) if tail.shape[2] or not full else ()
                return replace(self, pages=self.pages[:full] + last, lengths=lengths)
            return replace(self, pages=self.pages[:full] + type(self).kept(tail, lengths).pages, lengths=lengths)
        rows = [torch.cat([part.data[i, :, : part.lengths[i]] for part in others], 1) for i in range(len(lengths))]
        return replace(self, pages=tuple(self._page(at, rows, lengths) for at in range(0, max(max(lengths), 1), PAGE)), lengths=lengths)

    def _page(self, at: int, rows: Sequence[Tensor], lengths: tuple[int, ...]) -> Tensor:
        """The page from entry `at` on, once `rows` follow: as it was where nothing comes to it."""
        like, width = self.pages[0], min(PAGE, max(lengths) - at)
        had = self.pages[at // PAGE] if at // PAGE < len(self.pages) else like[:, :, :0]
        spans = [(max(a, at), min(b, at + width)) for a, b in zip(self.lengths, lengths, strict=True)]
        if had.shape[2] == width and all(a >= b for a, b in spans):
            return had
        page = like.new_zeros(*like.shape[:2], width, *like.shape[3:])
        page[:, :, : had.shape[2]] = had
        for i, (a, b) in enumerate(spans):
            if a < b:
                page[i, :, a - at : b - at] = rows[i][:, a - self.lengths[i] : b - self.lengths[i]]
        return page

    def cut(self, start: Sequence[int], stop: Sequence[int]) -> Self:
        """Entries start[i] to stop[i] of each row, as a copy."""
        lengths = tuple(b - a for a, b in zip(start, stop, strict=True))
        data = self.data
        if len(set(start)) <= 1 and len(set(stop)) <= 1:
            return type(self).kept(data[:, :, max(start, default=0) : max(stop, default=0)], lengths)
        out = data.new_zeros(*data.shape[:2], max(lengths), *data.shape[3:])
        for i, n in enumerate(lengths):
            out[i, :, :n] = data[i, :, start[i] : stop[i]]
        return type(self).kept(out, lengths)

    def pick(self, index: Sequence[int]) -> Self:
        """Rows by index, as a copy no wider than they need."""
        lengths = tuple(self.lengths[i] for i in index)
        rows = torch.tensor(index, dtype=torch.long, device=self.pages[0].device)
        if len(self.pages) == 1:
            return type(self).kept(self.pages[0][:, :, : max(lengths, default=0)].index_select(0, rows), lengths)
        ends = range(0, max(max(lengths, default=0), 1), PAGE)
        pages = (page[:, :, : max(lengths, default=0) - at].index_select(0, rows) for at, page in zip(ends, self.pages, strict=False))
        return replace(self, pages=tuple(pages), lengths=lengths)


@dataclass(frozen=True)
class Layer:
    """What a State has of one layer: `count` committed tokens of each row, held in `kept`; what is staged, keys and values or the inputs of
    a scan; how many numbers make a token, and what they came in."""

    count: tuple[int, ...]
    kept: Mapping[str, Ragged] | None
    staged: tuple[Ragged, ...]
    width: int
    dtype: torch.dtype


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """x (b, h, t, d) with its channels in another order, head by head: order (h, d), or (k, d) where heads in turn share k of them."""
    wide = order.to(x.device).repeat_interleave(x.shape[1] // order.shape[0], 0)
    return x.gather(-1, wide[None, :, None].expand(x.shape))


def stretched(x: Tensor, by: Tensor) -> Tensor:
    """x (b, h, t, d) with each channel times its factor, head by head, in fp32: by (h, d), or (k, d) where heads in turn share k of
    them."""
    return x.float() * by.to(x.device).repeat_interleave(x.shape[1] // by.shape[0], 0)[None, :, None]


# of each layer in turn the largest size of each channel of its keys as positions have turned them, (k, d), and how many pairs of channels
# i and i + pairs they turn; None where that is not known
Peaked = Callable[[], Iterator[tuple[Tensor, int] | None]]


@dataclass(eq=False)
class State(ABC):
    """KV pages, a state-space state, a convolution window. Laws: tokens that were not committed leave no trace; a fork is independent; a
    mark comes back exactly; how tokens were grouped into appends and commits leaves no trace either.

    A method is a dataclass whose fields are its knobs. It says how committed tokens are kept and read; both make new values and write to
    none, so that a mark costs nothing. steady: what is read of a token never changes, so that tokens which are appended together read
    each other as they would one by one; a law checks it."""

    steady: ClassVar[bool] = False
    layers: dict[int, Layer] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def keep(self, kept: Mapping[str, Ragged] | None, new: tuple[Ragged, ...]) -> Mapping[str, Ragged]:
        """`kept` (None: nothing yet) and after it, in each row, all of `new`. A staged tensor may be a view of a large one: copy it."""

    @abstractmethod
    def read(self, kept: Mapping[str, Ragged] | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
        """What attention may read: each of `staged` after what is kept of the same; in any dtype that holds it."""

    @abstractmethod
    def attend(self, query: Tensor, layer: int, mask: Tensor | None, scale: float | None = None) -> Tensor:
        """Attention over what is held, committed and staged: query (b, heads, t, d) of each row's last t tokens -> (b, heads, t, d of
        values). mask (b, t, longest row): true where a query may look besides being no earlier; None: wherever it is no earlier.
        scale: of scores, 1 / sqrt(d) unless told."""

    def fitted(self, loudness: Iterator[Tensor | None], peaked: Peaked | None = None) -> Self:
        """This state, empty, for one model. loudness: of each layer in turn how large the entries of each channel of its keys are by the
        weights, (k, d), without regard to positions; None where that is not known. peaked: the same of keys that the model made, which
        takes a pass. Most have no use for either and never ask."""
        return self

    def order(self, layer: int) -> Tensor | None:
        """In which order the channels of a layer's keys are held, head by head, (k, d); None: as they come. What is read has them as they
        came, and attention takes its queries in the order of the keys."""
        return None

    def stretch(self, layer: int) -> Tensor | None:
        """By what each channel of a layer's keys is multiplied before it is kept, head by head, (k, d); None: by nothing. What is read has
        keys as they came; attention over what is kept divides its queries."""
        return None

    def append(self, layer: int, new: tuple[Tensor, ...], positions: Tensor | None, mask: Tensor | None) -> tuple[Ragged, ...]:
        """Stage new tokens of one layer, and return what attention may read now."""
        self.stage(layer, new, positions, mask)
        return self.seen(layer)

    def stage(self, layer: int, new: tuple[Tensor, ...], positions: Tensor | None, mask: Tensor | None) -> None:
        """New tokens of one layer; they count only once committed.

        new: tensors (b, h, t, d), keys and values for attention; positions (b, t) of the tokens in their rows, for methods that turn keys;
        mask (b, t): false for padding, which is not held."""
        if (order := self.order(layer)) is not None:
            new = (reordered(new[0], order), *new[1:])
        fresh = tuple(Ragged.of(one, mask) for one in new)
        had = self.layers.get(layer)
        if had is None:
            had = Layer((0,) * new[0].shape[0], None, (), sum(one.shape[1] * one.shape[3] for one in new), new[0].dtype)
        staged = tuple(old.join(one) for old, one in zip(had.staged, fresh, strict=True)) if had.staged else fresh
        self.layers[layer] = replace(had, staged=staged)

    def commit(self, count: Tensor, layer: int | None = None) -> None:
        """Keep the first count[b] staged tokens of each row of the batch, forget the rest; of one layer, or of all that have some."""
        wanted = tuple(int(n) for n in count.tolist())
        found = [layer] if layer is not None else [i for i, had in self.layers.items() if had.staged]
        for i in found:
            has = self.waiting(i)
            if len(has) != len(wanted) or not all(0 <= n <= most for n, most in zip(wanted, has, strict=True)):
                bounds = f"layer {i} has {list(has)} staged"
                raise UserError(f"cannot commit {list(wanted)} tokens: {bounds}; give one count a row, within these")
        for i in found:
            had = self.layers[i]
            if not any(wanted) and had.kept is None:
                del self.layers[i]
                continue
            new = tuple(one if wanted == one.lengths else one.cut((0,) * len(wanted), wanted) for one in had.staged)
            if any(wanted) and (by := self.stretch(i)) is not None:
                new = (new[0].each(partial(stretched, by=by)), *new[1:])
            kept = self.keep(had.kept, new) if any(wanted) else had.kept
            self.layers[i] = replace(had, count=tuple(a + b for a, b in zip(had.count, wanted, strict=True)), kept=kept, staged=())

    def waiting(self, layer: int) -> tuple[int, ...]:
        """How many tokens of each row are staged."""
        had = self.layers.get(layer)
        return () if had is None else had.staged[0].lengths if had.staged else (0,) * len(had.count)

    def seen(self, layer: int) -> tuple[Ragged, ...]:
        """What attention may read of a layer, without anything new."""
        had = self.layers[layer]
        if had.kept is None or (by := self.stretch(layer)) is None:
            found = self.read(had.kept, had.staged)
        else:
            keys, *rest = self.read(had.kept, ())
            found = (keys.each(partial(stretched, by=1 / by)), *rest)
            found = tuple(one.join(new) for one, new in zip(found, had.staged, strict=True)) if had.staged else found
        found = tuple(one.each(lambda page: page.to(had.dtype)) for one in found)
        if (order := self.order(layer)) is None:
            return found
        places = order.argsort(-1)
        return (found[0].each(lambda page: reordered(page, places)), *found[1:])

    def fork(self, index: Tensor) -> Self:
        """An independent copy with rows picked by index; a row may be picked more than once."""
        rows = [int(i) for i in index.tolist()]
        twin = replace(self)
        for i, had in self.layers.items():
            kept = None if had.kept is None else {name: part.pick(rows) for name, part in had.kept.items()}
            count = tuple(had.count[row] for row in rows)
            twin.layers[i] = replace(had, count=count, kept=kept, staged=tuple(one.pick(rows) for one in had.staged))
        return twin

    def mark(self) -> Any:
        """A point to come back to, staged tokens included."""
        return dict(self.layers)

    def restore(self, mark: Any) -> None:
        """Back to a mark of this state; the mark can be used again."""
        self.layers = dict(mark)

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by dotted name; pages after the first have their number behind it."""
        found: dict[str, Tensor] = {}
        for i, had in self.layers.items():
            parts = {**(had.kept or {}), **{f"staged.{at}": one for at, one in enumerate(had.staged)}}
            for name, part in parts.items():
                found |= {f"{i}.{name}.{at}" if at else f"{i}.{name}": page for at, page in enumerate(part.pages)}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes really held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_number(self) -> float:
        """Average bits that a number of a cached token takes, everything counted; NaN where nothing is held."""
        numbers = sum((sum(had.count) + sum(self.waiting(i))) * had.width for i, had in self.layers.items())
        return 8 * self.nbytes / numbers if numbers else float("nan")


class Run(NamedTuple):
    """Tiles first to last of one pair of a row and a head of keys, and the worker that computes them."""

    worker: int
    pair: int
    first: int
    last: int


class Schedule(ABC):
    """Who computes which part of attention over a held cache. Law: every tile is computed once, in the order of its pair."""

    @abstractmethod
    def __call__(self, tiles: Sequence[int], workers: int) -> list[Run]:
        """tiles: how many each pair of a row and a head has. What a worker has of a pair is one run; runs of a pair follow one another."""


class Pattern(ABC):
    """Which blocks of keys a block of queries attends to in a prompt; `block` tokens make one. Laws: it keeps the blocks that the queries
    lie in and none that come later; what it keeps for a head does not depend on other heads and rows; attention over all is dense."""

    block: int

    @abstractmethod
    def __call__(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        """query (b, h, t, d) of the last t of s tokens, key (b, k, s, d) -> (b, h, ceil(t / block), ceil(s / block)) bool. scale: of
        scores, 1 / sqrt(d) unless told."""


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


class Codec(ABC):
    """What is stored or sent. Law: lossless ones are exact, lossy ones stay within their bound."""

    lossless: bool

    @abstractmethod
    def encode(self, value: Tensor) -> bytes:
        """The stored bytes."""

    @abstractmethod
    def decode(self, stored: bytes) -> Tensor:
        """The value again."""
