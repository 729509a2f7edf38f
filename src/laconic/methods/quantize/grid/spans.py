"""Vectors in the span of a basis: a code names `rank` numbers in a table, and a basis makes `width` consecutive weights of a row of them.

Stored: codes (n, ceil(r b / 8)) uint8, r = ceil(m / width) vectors a row, b = ceil(log2 k) bits each; table (k, rank) bf16; basis (rank,
width) bf16, or none where rank = width: then an entry is the weights themselves (product quantization). W[i, j width + l] =
sum_c table[code[i, j], c] basis[c, l].  Bits per weight: b / width, and 16 (k rank + rank width) once a matrix. A last vector that the row
does not fill is legal and counted whole.  Sibling: quantize.grid.vectors (vectors along a column, no basis)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from laconic.core.packed import Coded, Packed, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.grids import through
from laconic.kernels.vectors import FEWEST, PART, kmeans, nearest
from laconic.methods.quantize.grid.vectors import Entries, inside


@dataclass(frozen=True)
class Span:
    """width: weights that a code names; entries: of the table, 2 to 65,536, fewer for small matrices; rank: numbers of an entry, 1 to
    width; width: no basis."""

    width: int = 9
    entries: int = 64
    rank: int = 4

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: a vector has at least one weight")
        if not 2 <= self.entries <= 2**16:
            raise ValueError(f"entries={self.entries}: a table has 2 to 65,536 entries")
        if not 1 <= self.rank <= self.width:
            raise ValueError(f"rank={self.rank}: an entry has 1 to width={self.width} numbers")

    @property
    def bits(self) -> int:
        """Of a code."""
        return (self.entries - 1).bit_length()

    def runs(self, m: int) -> int:
        """Vectors in a row of m weights, the ragged last one included."""
        return -(-m // self.width)

    def fitted(self, n: int, m: int) -> Span:
        """For an (n, m) matrix: no more than one entry for FEWEST vectors, but two."""
        return replace(self, entries=max(2, min(self.entries, n * self.runs(m) // FEWEST)))


def cut(weight: Tensor, width: int) -> Tensor:
    """(n, m) -> vectors (n ceil(m / width), width), zeros beyond the row."""
    return F.pad(weight, (0, -weight.shape[1] % width)).reshape(-1, width)


def laid(vectors: Tensor, n: int, m: int) -> Tensor:
    """The inverse of cut."""
    return vectors.reshape(n, -1)[:, :m]


def made(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """What numbers (..., rank) stand for, (..., width)."""
    return vectors if basis is None else vectors @ basis


class Spanned(Packed):
    """A matrix view of `shape` in a Span that fits it."""

    form = "quantize.grid.spans.Spanned"
    codes: Tensor
    table: Tensor

    def __init__(self, shape: tuple[int, ...], span: Span, codes: Tensor, table: Tensor, basis: Tensor | None) -> None:
        super().__init__()
        self.shape, self.span = tuple(shape), span
        self.register_buffer("codes", codes)
        self.register_buffer("table", table)
        # one that is not there is not stored
        self.register_buffer("basis", basis)

    basis: Tensor | None

    @classmethod
    def of(cls, shape: tuple[int, ...], span: Span, codes: Tensor, table: Tensor, basis: Tensor | None) -> Self:
        """From plain codes (n, r), table (k, rank) and basis (rank, width), fp32 with bf16 values."""
        return cls(shape, span, pack(codes, span.bits), table.bfloat16(), None if basis is None else basis.bfloat16())

    @staticmethod
    def bytes_of(n: int, m: int, span: Span) -> int:
        """Stored bytes of an (n, m) matrix, of a level that need not fit it."""
        level = span.fitted(n, m)
        basis = level.rank * level.width if level.rank < level.width else 0
        return n * packed_width(level.runs(m), level.bits) + 2 * (level.entries * level.rank + basis)

    def plain(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Codes (rows, r) of the chosen rows, int64."""
        return unpack(self.codes[index], self.span.bits, self.span.runs(self.matrix[1])).long()

    def rows(self, index: Tensor | slice) -> Tensor:
        entries = made(self.table.float(), None if self.basis is None else self.basis.float())
        return entries[self.plain(index)].flatten(1)[:, : self.matrix[1]]

    def dense(self) -> Tensor:
        return self.rows(slice(None)).reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return Moving(self, target) if way is None else way(self, target)

    def coded(self) -> Coded:
        return Named(self)

    def describe(self) -> dict[str, Any]:
        level = self.span
        return {"form": self.form, "shape": list(self.shape), "width": level.width, "entries": level.entries, "rank": level.rank}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        span = Span(**{name: described[name] for name in ("width", "entries", "rank")})
        return cls(tuple(described["shape"]), span, tensors["codes"], tensors["table"], tensors.get("basis"))


class Basis(nn.Module):
    """A basis that learns. basis (rank, width), in units of its own size."""

    unit: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", basis.float().square().mean().sqrt().clamp(min=2.0**-100))
        self.basis = nn.Parameter(basis.float() / self.unit)

    def forward(self) -> Tensor:
        """With the values that it is stored with; gradients pass that rounding."""
        wished = self.basis * self.unit
        return through(wished, wished.detach().bfloat16().float())


class Named(Coded):
    """Table and basis that learn while codes stay, until they are exchanged."""

    def __init__(self, held: Spanned) -> None:
        super().__init__()
        self.shape, self.span = held.shape, held.span
        self.entries = Entries(held.table)
        self.frame = None if held.basis is None else Basis(held.basis)
        self.register_buffer("codes", held.plain())

    codes: Tensor

    def _whole(self) -> Tensor:
        """What each entry stands for, (k, width)."""
        return made(self.entries(), None if self.frame is None else self.frame())

    def dense(self) -> Tensor:
        return laid(self._whole()[self.codes.reshape(-1)], *self.matrix).reshape(self.shape)

    def groups(self, matrix: Tensor) -> Tensor:
        return cut(matrix, self.span.width)

    def nearest(self, index: Tensor, wished: Tensor) -> tuple[Tensor, Tensor]:
        whole = self._whole()
        codes = nearest(wished, whole)
        return codes, whole[codes]

    def exchange(self, index: Tensor, codes: Tensor) -> None:
        self.codes.view(-1)[index] = codes.long()

    def harden(self) -> Spanned:
        with torch.no_grad():
            return Spanned.of(self.shape, self.span, self.codes, self.entries(), None if self.frame is None else self.frame())


class Moving(Soft):
    """Codes, table and basis that are learned together. position (N, rank), in units of the table's size: where each vector stands, the
    code being that of the nearest entry.

    heat None: an entry stands for the vector, and the gradient passes from it to the position. Else the vector is a mixture of entries,
    with weights softmax(-|position - entry|^2 / t): t falls from heat[0] to heat[1] mean squared distances to the nearest entry. Before
    the share `warm` of the steps there are no entries: the position is the vector, and then the table is found anew."""

    spread: Tensor

    def __init__(self, held: Spanned, target: Tensor, warm: float = 0.0, heat: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.shape, self.span, self.warm, self.heat, self.done = held.shape, held.span, warm, heat, 0.0
        table, codes = held.table.float(), held.plain()
        self.entries = Entries(held.table)
        self.frame = None if held.basis is None else Basis(held.basis)
        wished = cut(target.reshape(held.matrix).float(), self.span.width)
        if held.basis is not None:
            wished = wished @ torch.linalg.pinv(held.basis.float())
        # in units of the table, whose squares may be no numbers
        unit = self.entries.unit
        begun = inside((wished / unit)[None], codes.reshape(1, -1), table / unit, None)[0]
        # vectors that are not to be rounded yet begin where they are
        self.position = nn.Parameter(wished / unit if warm else begun)
        self.register_buffer("begun", begun if warm else None)
        self.register_buffer("spread", self._distance(self.position.detach()))

    begun: Tensor | None

    def _distance(self, position: Tensor) -> Tensor:
        """Mean squared distance to the nearest entry, in units of the table's size."""
        table = self.entries.table.detach()
        return (position - table[nearest(position, table)]).square().sum(1).mean().clamp(min=1e-12)

    def penalty(self, done: float) -> Tensor | None:
        if self.warm and self.done < self.warm <= done:
            with torch.no_grad():
                # what was learned without entries has clusters of its own
                position, generator = self.position.detach(), torch.Generator().manual_seed(0)
                self.entries.table.copy_(kmeans(position, torch.ones_like(position), self.span.entries, generator))
                self.spread.copy_(self._distance(position))
        self.done = done
        if done:
            self.begun = None
        return None

    def _mixed(self, position: Tensor, table: Tensor) -> Tensor:
        assert self.heat is not None
        first, last = (math.log(one) for one in self.heat)
        share = max(0.0, self.done - self.warm) / max(1.0 - self.warm, 1e-6)
        t = float(self.spread) * math.exp(first + (last - first) * share)
        found = []
        for part in position.split(max(1, PART // len(table))):
            distance = table.square().sum(1) - 2 * part @ table.T
            found.append((-distance / t).softmax(1) @ table)
        return torch.cat(found)

    def _vectors(self) -> Tensor:
        unit, position = self.entries.unit, self.position
        if self.heat is None:
            table, at = self.entries(), position * unit
            return table[nearest(position.detach(), table.detach() / unit)] + (at - at.detach())
        if self.done < self.warm:
            return position * unit
        return self._mixed(position, self.entries() / unit) * unit

    def dense(self) -> Tensor:
        whole = made(self._vectors(), None if self.frame is None else self.frame())
        return laid(whole, *self.matrix).reshape(self.shape)

    def harden(self) -> Spanned:
        with torch.no_grad():
            table, basis = self.entries(), None if self.frame is None else self.frame()
            position = self.position if self.begun is None else self.begun
            codes = nearest(position, table / self.entries.unit).reshape(self.matrix[0], -1)
            return Spanned.of(self.shape, self.span, codes, table, basis)
