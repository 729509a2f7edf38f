"""Vector codebooks: an index names `width` consecutive weights of a column, in a table of the matrix's own.

Stored: codes (ceil(n / width), ceil(m b / 8)) uint8, the b-bit indices of all columns of `width` rows packed one after another; table
(2^b, width) bf16; with a residual the same once more (`rest`, `finer`), whose entries are added; scales (n,) bf16 where rows have a factor
of their own. W[r width + i, j] = (table[code[r, j], i] + finer[rest[r, j], i]) * scales[r width + i].
Bits per weight: b / width, and 16 * 2^b * width once a matrix. A last run of rows that does not fill `width` is legal and counted whole.
Sibling: quantize.grid.levels (a table of single numbers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laconic.core.packed import Coded, Packed, Soft, Way
from laconic.kernels.bits import pack, packed_width, unpack
from laconic.kernels.books import book_dense, book_linear
from laconic.kernels.grids import through
from laconic.kernels.vectors import PART, Vectors, cut, laid, looked_up, nearest, nearest_sums, weighing

# what is stored of each table
NAMES = (("codes", "table"), ("rest", "finer"))


class Vectored(Packed):
    """A matrix view of `shape` in Vectors that fit it (`Vectors.fitted`)."""

    form = "quantize.grid.vectors.Vectored"

    def __init__(
        self, shape: tuple[int, ...], vectors: Vectors, codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None
    ) -> None:
        super().__init__()
        self.shape, self.vectors = tuple(shape), vectors
        for (code_name, table_name), code, table in zip(NAMES, codes, tables, strict=False):
            self.register_buffer(code_name, code)
            self.register_buffer(table_name, table)
        # those that are not there are not stored
        self.register_buffer("scales", scales)

    scales: Tensor | None

    @classmethod
    def of(cls, shape: tuple[int, ...], vectors: Vectors, codes: Sequence[Tensor], tables: Sequence[Tensor], scale: Tensor | None) -> Self:
        """From plain indices (runs, m) into each table (2^b, width), and scale (n,), fp32 with bf16 values."""
        packed = [pack(code, bits) for code, bits in zip(codes, vectors.bits, strict=True)]
        return cls(shape, vectors, packed, [table.bfloat16() for table in tables], None if scale is None else scale.bfloat16())

    @staticmethod
    def bytes_of(n: int, m: int, vectors: Vectors) -> int:
        """Stored bytes of an (n, m) matrix, of a level that need not fit it."""
        level = vectors.fitted(n, m)
        each = [level.runs(n) * packed_width(m, bits) + 2 * level.width * 2**bits for bits in level.bits]
        return sum(each) + (2 * n if level.scaled else 0)

    def tables(self) -> list[Tensor]:
        """Each table, (2^b, width) bf16."""
        return [getattr(self, name) for _, name in NAMES[: len(self.vectors.bits)]]

    def plain(self, runs: Tensor | slice = slice(None)) -> list[Tensor]:
        """Indices into each table of the chosen runs of rows, (runs, m)."""
        names = zip(NAMES, self.vectors.bits, strict=False)
        return [unpack(getattr(self, name)[runs], bits, self.matrix[1]) for (name, _), bits in names]

    def _codes(self) -> list[Tensor]:
        """Packed indices into each table."""
        return [getattr(self, name) for name, _ in NAMES[: len(self.vectors.bits)]]

    def rows(self, index: Tensor | slice) -> Tensor:
        at = torch.arange(self.matrix[0])[index]
        runs, where = (at // self.vectors.width).unique(return_inverse=True)
        dense = looked_up(self.plain(runs), self.tables()).transpose(1, 2)[where, at % self.vectors.width]
        return dense if self.scales is None else dense * self.scales[index].float()[:, None]

    def matmul(self, x: Tensor) -> Tensor:
        return book_linear(x, self._codes(), self.tables(), self.scales, self.vectors, self.matrix[0])

    def dense(self) -> Tensor:
        return book_dense(self._codes(), self.tables(), self.scales, self.vectors, *self.matrix).reshape(self.shape)

    def soften(self, target: Tensor, way: Way | None = None) -> Soft | None:
        return Placed(self, target) if way is None else way(self, target)

    def coded(self) -> Coded:
        return Tabled(self)

    def describe(self) -> dict[str, Any]:
        level = self.vectors
        found = {"form": self.form, "shape": list(self.shape), "width": level.width, "index": level.index}
        return found | {"residual": level.residual, "scaled": level.scaled}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        level = Vectors(**{name: described[name] for name in ("width", "index", "residual", "scaled")})
        names = NAMES[: len(level.bits)]
        codes, tables = [tensors[name] for name, _ in names], [tensors[name] for _, name in names]
        return cls(tuple(described["shape"]), level, codes, tables, tensors.get("scales"))


class Entries(nn.Module):
    """A table that learns. table (k, width): in units of its own size, so that one rate serves all matrices."""

    unit: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", table.float().square().mean().sqrt().clamp(min=2.0**-100))
        self.table = nn.Parameter(table.float() / self.unit)

    def forward(self) -> Tensor:
        """The entries with the values that they are stored with; gradients pass that rounding."""
        wished = self.table * self.unit
        return through(wished, wished.detach().bfloat16().float())


class Rows(nn.Module):
    """Scales of rows that learn. step (n,): logarithm of a factor."""

    scale: Tensor

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scales.float())
        self.step = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self) -> Tensor:
        """(n,) as they are stored."""
        wished = self.scale * self.step.exp()
        return through(wished, wished.detach().bfloat16().float())


def _scaled(vectors: Tensor, rows: Rows | None, shape: tuple[int, ...]) -> Tensor:
    """The tensor that vectors (runs, m, width) are before rows are scaled."""
    dense = laid(vectors, shape[0])
    return (dense if rows is None else dense * rows()[:, None]).reshape(shape)


class Tabled(Coded):
    """Tables (and scales of rows) that learn while indices stay, until they are exchanged."""

    def __init__(self, held: Vectored) -> None:
        super().__init__()
        self.shape, self.vectors = held.shape, held.vectors
        self.entries = nn.ModuleList(Entries(table) for table in held.tables())
        self.rowwise = None if held.scales is None else Rows(held.scales)
        self.register_buffer("codes", torch.stack([code.to(torch.int32) for code in held.plain()]))

    codes: Tensor

    def _tables(self) -> list[Tensor]:
        return [entries() for entries in self.entries]

    def dense(self) -> Tensor:
        return _scaled(looked_up(list(self.codes), self._tables()), self.rowwise, self.shape)

    def groups(self, matrix: Tensor) -> Tensor:
        return cut(matrix, self.vectors.width).reshape(-1, self.vectors.width)

    def nearest(self, index: Tensor, wished: Tensor) -> tuple[Tensor, Tensor]:
        runs, scale = index // self.matrix[1], torch.ones(self.matrix[0]) if self.rowwise is None else self.rowwise()
        own = cut(scale[:, None], self.vectors.width)[runs, 0]
        tables = self._tables()
        found = nearest_sums(wished / own.clamp(min=2.0**-126), tables, own.square())
        return torch.stack(found), looked_up(found, tables) * own

    def exchange(self, index: Tensor, codes: Tensor) -> None:
        self.codes.reshape(len(self.codes), -1)[:, index] = codes.to(torch.int32)

    def harden(self) -> Vectored:
        with torch.no_grad():
            scale = None if self.rowwise is None else self.rowwise()
            return Vectored.of(self.shape, self.vectors, list(self.codes), self._tables(), scale)


# how far on the way from its entry to the border of what is nearest to that a vector may begin
INSIDE = 0.9


def inside(vectors: Tensor, codes: Tensor, table: Tensor, weigh: Tensor | None) -> Tensor:
    """On the line from the entry that codes (runs, m) name to vectors (runs, m, width): the nearest point to these that still has that
    entry as its nearest, and is not at the border. weigh (runs, 1, width) as for `nearest`."""
    flat, own = vectors.reshape(-1, vectors.shape[-1]), table[codes.reshape(-1).long()]
    every = torch.ones_like(flat) if weigh is None else weigh.expand_as(vectors).reshape(flat.shape)
    found = []
    for i in range(0, len(flat), step := max(1, PART // len(table))):
        a, entry, away = every[i : i + step], own[i : i + step], flat[i : i + step] - own[i : i + step]
        # with c the entry and d another: x is nearer to c while (x - c) . (d - c) is below half of |d - c|^2
        along = (a * away) @ table.T - (a * away * entry).sum(1, keepdim=True)
        half = (a @ table.square().T - 2 * (a * entry) @ table.T + (a * entry.square()).sum(1, keepdim=True)) / 2
        reach = torch.where(along > 0, half / along.clamp(min=1e-30), torch.inf).clamp(min=0).amin(1, keepdim=True)
        found.append(entry + away * (INSIDE * reach).clamp(max=1.0))
    return torch.cat(found).reshape(vectors.shape) if found else vectors


class Latent(nn.Module):
    """One table and where each vector stands, both learned. position (runs, m, width), in units of the table's size: the index is that of
    the nearest entry, and the gradient passes from the entry to the position (van den Oord et al. 2017, arXiv:1711.00937, section 3.2)."""

    def __init__(self, table: Tensor, codes: Tensor, wished: Tensor, weigh: Tensor | None) -> None:
        super().__init__()
        self.entries = Entries(table)
        begun = inside(wished, codes, table.float(), weigh)
        self.register_buffer("weigh", weigh)
        self.position = nn.Parameter(begun / self.entries.unit)

    weigh: Tensor | None

    def codes(self) -> Tensor:
        """(runs, m) int64."""
        with torch.no_grad():
            return nearest(self.position * self.entries.unit, self.entries(), self.weigh)

    def forward(self) -> Tensor:
        """Vectors (runs, m, width)."""
        at = self.position * self.entries.unit
        return self.entries()[self.codes()] + (at - at.detach())


class Placed(Soft):
    """Indices, tables (and scales of rows) that are learned together; each table has positions of its own."""

    def __init__(self, held: Vectored, target: Tensor) -> None:
        super().__init__()
        self.shape, self.vectors = held.shape, held.vectors
        (n, _), width = held.matrix, held.vectors.width
        self.rowwise = None if held.scales is None else Rows(held.scales)
        scale = torch.ones(n) if held.scales is None else held.scales.float().clamp(min=2.0**-126)
        weigh = None if held.scales is None and n % width == 0 else weighing(n, width, None if held.scales is None else scale)[:, None]
        wished, codes = cut(target.reshape(held.matrix).float() / scale[:, None], width), held.plain()
        terms = [table.float()[code.long()] for table, code in zip(held.tables(), codes, strict=True)]
        whole = sum(terms[1:], terms[0])
        # each table's share of the target is what the others leave
        made = zip(held.tables(), codes, terms, strict=True)
        self.latent = nn.ModuleList(Latent(table, code, wished - (whole - term), weigh) for table, code, term in made)

    def dense(self) -> Tensor:
        first, *rest = [latent() for latent in self.latent]
        return _scaled(sum(rest, first), self.rowwise, self.shape)

    def harden(self) -> Vectored:
        with torch.no_grad():
            latents = [latent for latent in self.latent if isinstance(latent, Latent)]
            codes, tables = [latent.codes() for latent in latents], [latent.entries() for latent in latents]
            return Vectored.of(self.shape, self.vectors, codes, tables, None if self.rowwise is None else self.rowwise())
