"""Vector codebooks: an index of b bits names width consecutive weights of a column, so that W is about table[index].

Vectors stand along the rows of W (n, m): vector (r, j) is W[r width : (r + 1) width, j], as in VPTQ (Liu et al. 2024, arXiv:2409.17066,
figure 2), and the indices of all columns of `width` rows lie one after another. A product then adds x_j table[index] to `width` sums.
Rows beyond n, where width does not divide it, hold zeros and count nothing. A second table may say what the first leaves over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# a table has at most one entry for so many vectors: with fewer it would hold the weights themselves
FEWEST = 16
# distances at once, so that they stay in a cache, and vectors that a centroid is fitted to at most
PART, SAMPLE = 256 * 1024, 64
# rounds of k-means at most, and steps of the solver for tables
ROUNDS, STEPS = 25, 24


@dataclass(frozen=True)
class Vectors:
    """width: weights that an index names; index: its bits, 1 to 16; residual: bits of the index into a second table, 0 for none; scaled:
    one factor a row beside the tables. Small matrices have smaller tables, and shorter indices into them (`fitted`)."""

    width: int = 4
    index: int = 8
    residual: int = 0
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: a vector has at least one weight")
        if not 1 <= self.index <= 16:
            raise ValueError(f"index={self.index}: an index has 1 to 16 bits")
        if not 0 <= self.residual <= 16:
            raise ValueError(f"residual={self.residual}: an index into the second table has 1 to 16 bits; 0 for none")

    @property
    def bits(self) -> tuple[int, ...]:
        """Of the index into each table."""
        return (self.index, self.residual) if self.residual else (self.index,)

    def runs(self, n: int) -> int:
        """Vectors in a column of n weights, the ragged last one included."""
        return -(-n // self.width)

    def fitted(self, n: int, m: int) -> Vectors:
        """For an (n, m) matrix: no table has more than one entry for FEWEST vectors, but two."""
        most = max(1, (self.runs(n) * m // FEWEST).bit_length() - 1)
        return replace(self, index=min(self.index, most), residual=min(self.residual, most))


def cut(weight: Tensor, width: int) -> Tensor:
    """(n, m) -> vectors (ceil(n / width), m, width), rows beyond n zero."""
    n, m = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -n % width))
    return padded.reshape(-1, width, m).transpose(1, 2)


def laid(vectors: Tensor, n: int) -> Tensor:
    """The inverse of cut: (runs, m, width) -> (n, m)."""
    return vectors.transpose(1, 2).reshape(-1, vectors.shape[1])[:n]


def looked_up(codes: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
    """The vectors that indices (...) into each table (k, width) stand for, (..., width) fp32: their sum."""
    first, *rest = [table.float()[code.long()] for code, table in zip(codes, tables, strict=True)]
    for term in rest:
        first = first + term
    return first


def nearest(vectors: Tensor, table: Tensor, weigh: Tensor | None = None) -> Tensor:
    """The index of the nearest entry of table (k, width) for vectors (..., width), int64; weigh, broadcast to vectors: how much each
    number's squared error counts."""
    flat, squares = vectors.reshape(-1, vectors.shape[-1]), table.square()
    every = None if weigh is None else weigh.expand_as(vectors).reshape(flat.shape)
    found = []
    for i in range(0, len(flat), step := max(1, PART // len(table))):
        x = flat[i : i + step]
        if every is None:
            found.append(torch.addmm(squares.sum(1), x, table.T, alpha=-2.0).argmin(1))
        else:
            a = every[i : i + step]
            found.append(torch.addmm(a @ squares.T, a * x, table.T, alpha=-2.0).argmin(1))
    return torch.cat(found).reshape(vectors.shape[:-1]) if found else flat.new_zeros(vectors.shape[:-1], dtype=torch.int64)


def nearest_sums(vectors: Tensor, tables: Sequence[Tensor], weigh: Tensor | None = None) -> list[Tensor]:
    """Indices into each table, one after another: the nearest entry of the first, then of the next for what is left over."""
    found: list[Tensor] = []
    for table in tables:
        found.append(nearest(vectors, table, weigh))
        vectors = vectors - table[found[-1]]
    return found


def kmeans(vectors: Tensor, weigh: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centroids (count, width) of vectors (N, width), each number's squared error counted by weigh (N, width), not negative. Lloyd's
    rounds from k-means++ (Arthur and Vassilvitskii 2007, section 2.2), over at most SAMPLE vectors a centroid; one that nothing is nearest
    to stays where it is."""
    if len(vectors) > SAMPLE * count:
        chosen = torch.randperm(len(vectors), generator=generator)[: SAMPLE * count]
        vectors, weigh = vectors[chosen], weigh[chosen]
    # how much a vector counts as a whole, for what is drawn
    heavy = weigh.mean(1)
    table = vectors.new_zeros(count, vectors.shape[1])
    away = heavy
    for i in range(count):
        odds = away if bool(away.sum() > 0) else torch.ones_like(away)
        table[i] = vectors[int(torch.multinomial(odds / odds.max(), 1, generator=generator))]
        distance = heavy * (vectors - table[i]).square().sum(1)
        away = distance if i == 0 else torch.minimum(away, distance)
    before = None
    for _ in range(ROUNDS):
        codes = nearest(vectors, table, weigh)
        if before is not None and bool((codes == before).all()):
            break
        before = codes
        mass = torch.zeros_like(table).index_add_(0, codes, weigh)
        moment = torch.zeros_like(table).index_add_(0, codes, weigh * vectors)
        table = torch.where(mass > 0, moment / mass.clamp(min=1e-38), table)
    return table


def fit_tables(vectors: Tensor, weigh: Tensor, bits: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """A table of k-means for vectors (N, width), and one more for what each before it leaves over; fp32 with bf16 values."""
    tables = []
    for one in bits:
        tables.append(kmeans(vectors, weigh, 2**one, generator).bfloat16().float())
        vectors = vectors - tables[-1][nearest(vectors, tables[-1], weigh)]
    return tables


class Book(NamedTuple):
    """Some columns of a matrix, (c,) rising, and the tables that hold them, each (k, width) fp32."""

    columns: Tensor
    tables: list[Tensor]

    @property
    def width(self) -> int:
        """Weights of a vector."""
        return self.tables[0].shape[1]


# indices (runs, c) into each table of a book
Codes = list[Tensor]


def weighing(n: int, width: int, scale: Tensor | None) -> Tensor:
    """How much each number of a column's vectors counts, (runs, width): the square of its row's scale (n,), rows beyond n nothing."""
    return cut((torch.ones(n) if scale is None else scale.square())[:, None], width)[:, 0]


def assembled(books: Sequence[Book], codes: Sequence[Codes], scale: Tensor | None, n: int) -> Tensor:
    """The matrix (n, m) fp32 that the books hold together, rows times scale (n,)."""
    out = torch.empty(n, sum(len(book.columns) for book in books))
    for book, found in zip(books, codes, strict=True):
        out[:, book.columns] = laid(looked_up(found, book.tables), n)
    return out if scale is None else out * scale[:, None]


def refit(
    books: Sequence[Book],
    codes: Sequence[Codes],
    weight: Tensor,
    parts: Sequence[tuple[slice, Tensor]],
    scale: Tensor | None,
    damping: float,
) -> list[Book]:
    """The books with the tables that make trace(dW H dW^T) least while all indices stay, dW = weight (n, m) - assembled: a linear problem
    for all tables together, solved by conjugate gradients from the tables as they are. parts: rows and their Gram matrix (m, m); H is that
    and `damping` times its mean diagonal. Tables come back with bf16 values."""
    n = weight.shape[0]
    scaled = torch.ones(n) if scale is None else scale
    sizes = [table.shape for book in books for table in book.tables]

    def split(x: Tensor) -> list[Book]:
        pieces = [piece.reshape(size) for piece, size in zip(x.split([size.numel() for size in sizes]), sizes, strict=True)]
        return [Book(book.columns, [pieces.pop(0) for _ in book.tables]) for book in books]

    def gathered(rows: Tensor) -> Tensor:
        """The sum of what each entry of each table stands for."""
        found = []
        for book, own in zip(books, codes, strict=True):
            vectors = cut(rows[:, book.columns], book.width).reshape(-1, book.width)
            for table, code in zip(book.tables, own, strict=True):
                found.append(torch.zeros_like(table).index_add_(0, code.reshape(-1), vectors).reshape(-1))
        return torch.cat(found)

    def weighed(delta: Tensor) -> Tensor:
        out = torch.empty_like(delta)
        for rows, gram in parts:
            out[rows] = delta[rows] @ gram + damping * gram.diagonal().mean() * delta[rows]
        return out

    def curved(x: Tensor) -> Tensor:
        return gathered(weighed(assembled(split(x), codes, scale, n)) * scaled[:, None])

    begun = torch.cat([table.reshape(-1) for book in books for table in book.tables])
    heavy = torch.cat([gram.diagonal().expand(weight[rows].shape) for rows, gram in parts]) * scaled.square()[:, None]
    ease = gathered(heavy).clamp(min=1e-30)
    x, left = begun.clone(), gathered(weighed(weight - assembled(books, codes, scale, n)) * scaled[:, None])
    along = eased = left / ease
    size = first = float(left @ eased)
    for _ in range(STEPS):
        if not size > 1e-8 * first:
            break
        bent = curved(along)
        step = size / max(float(along @ bent), 1e-38)
        x += step * along
        left -= step * bent
        eased = left / ease
        size, last = float(left @ eased), size
        along = eased + size / last * along
    return [Book(book.columns, [table.bfloat16().float() for table in book.tables]) for book in split(x)]
