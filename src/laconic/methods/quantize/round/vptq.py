"""VPTQ: vectors of a column go to the entries of a codebook, column by column, each error pushed onto the columns not yet rounded.

Liu et al. 2024, arXiv:2409.17066, sections 3.1 to 3.3, algorithm 1.  trace(dW H dW^T) is made small, H = mean(x xT) damped:
1. a table of 2^b entries for vectors of `width` weights along the output dimension, k-means weighted by H_jj (eq. 9), and with a residual
   a second table for what is left over; columns of the greatest H_jj, a share `outliers` of all, have a finer table of their own;
2. columns are settled one after another, by falling H_jj: entries nearest to the column's vectors, which is least error since all numbers
   of a vector share H_jj; e = (w_j - table[index]) / U_jj goes onto the others as in GPTQ (eq. 6, "channel-independent");
3. `refit`: indices stay, and the tables of least trace(dW H dW^T) are solved for.
The paper fine-tunes centroids by gradient steps against the layer's output; step 3 is the end of that, since it is a linear problem.
weight (n, m), gram (m, m) -> indices (n / width, m) into tables (2^b, width) bf16.  Every byte of the tables counts, and small matrices
have smaller ones (`kernels.vectors.Vectors.fitted`).  Tables and indices learn further by quantize.train.straight or quantize.train.pv.
Sibling: quantize.round.gptq (single weights on a grid)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.statistic import Gram, by_rows
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.obs import Factor, inverse_factor, remarks, round_vectors
from laconic.kernels.vectors import Book, Codes, Vectors, cut, fit_tables, refit, weighing
from laconic.methods.quantize.grid.apart import Apart, others
from laconic.methods.quantize.grid.vectors import Vectored

CARD = Card(Paper("Liu et al.", 2024, "arXiv:2409.17066", "section 3, algorithm 1"), catalogue="vptq", sibling="quantize.round.gptq")


@dataclass(frozen=True)
class Codebooks:
    """bits: of indices, for each weight, so that an index has bits * width, rounded; residual: how many of these are into a second table;
    width, scaled: as in Vectors; outliers: the share of columns with a table of their own, for vectors half as long."""

    width: int = 4
    bits: float = 2.0
    residual: float = 0.0
    scaled: bool = False
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers={self.outliers}: a share of the columns, below 1")
        if not 0 <= self.residual < self.bits:
            raise ValueError(f"residual={self.residual}: some of the {self.bits} bits, not all")
        # its bounds are checked there
        _ = self.vectors

    @property
    def vectors(self) -> Vectors:
        """Of the columns that are no outliers."""
        return Vectors(self.width, round((self.bits - self.residual) * self.width), round(self.residual * self.width), self.scaled)

    @property
    def finer(self) -> Vectors:
        """Of outliers."""
        return replace(self.vectors, width=max(1, self.width // 2))

    def apart(self, m: int) -> int:
        """How many of m columns are outliers: all but one at most."""
        return min(math.ceil(self.outliers * m), m - 1)


@dataclass(frozen=True)
class VPTQ(Transform):
    """damping: fraction of the Hessian's mean diagonal; block: columns between lazy updates; refit: solve for the tables once all indices
    are there; seed: of what k-means draws."""

    damping: float = 0.01
    block: int = 128
    refit: bool = True
    seed: int = 0

    acts_on = (Linear, Conv, Embedding)
    level = Codebooks
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Codebooks) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Codebooks]) -> Iterator[Change]:
        """All levels with one factorization."""
        n, m = site.matrix
        weight = weights["weight"].reshape(n, m).float()
        # a power of two, so that tables in its units lose nothing when they are stored
        unit = weight.square().mean().sqrt().clamp(min=2.0**-100).log2().round().exp2()
        weight = weight / unit
        apart = by_rows(stats[Gram()], n)
        heard = torch.stack([gram.diagonal() for _, gram in apart]).mean(0).clamp(min=0)
        walks: dict[bool, tuple[list[tuple[slice, Tensor]], list[Tensor], list[Factor]]] = {}
        for level in levels:
            # vectors that lie across groups of a convolution see the mean of what these see
            across = len(apart) > 1 and n // len(apart) % level.width > 0
            if across not in walks:
                parts = [(slice(0, n), stats[Gram()].mean(0))] if across else apart
                orders = [gram.diagonal().argsort(descending=True, stable=True) for _, gram in parts]
                found = [inverse_factor(gram[order][:, order], self.damping) for (_, gram), order in zip(parts, orders, strict=True)]
                walks[across] = parts, orders, found
            parts, orders, factors = walks[across]
            scale = _scales(weight) if level.scaled else None
            books = self._books(weight, parts, heard, scale, level)
            swept = []
            for (rows, _), factor, order in zip(parts, factors, orders, strict=True):
                own = None if scale is None else scale[rows]
                swept.append(round_vectors(weight[rows], factor, books, order, scale=own, block=self.block))
            codes = [[torch.cat(found) for found in zip(*each, strict=True)] for each in zip(*swept, strict=True)]
            if self.refit:
                books = refit(books, codes, weight, parts, scale, self.damping)
            notes = remarks(site.name, factors, self.damping, "were rounded to nearest")
            yield Change(hold={site.tensors["weight"]: _held(site, level, books, codes, scale, unit)}, notes=notes)

    def _books(
        self, weight: Tensor, parts: Sequence[tuple[slice, Tensor]], heard: Tensor, scale: Tensor | None, level: Codebooks
    ) -> list[Book]:
        """Tables of the columns that are no outliers, and of those that are, where there are some."""
        n, m = weight.shape
        few = heard.argsort(descending=True, stable=True)[: level.apart(m)].sort().values
        plain = weight if scale is None else weight / scale.clamp(min=2.0**-126)[:, None]
        diagonals = torch.cat([gram.diagonal().clamp(min=0).expand(rows.stop - rows.start, -1) for rows, gram in parts])
        # a Hessian of nothing, as an expert that no token reached has, says that all columns are alike
        diagonals = diagonals / diagonals.max() if bool(diagonals.max() > 0) else torch.ones_like(diagonals)
        generator = torch.Generator().manual_seed(self.seed)
        books = []
        for columns, vectors in ((others(few, m), level.vectors), (few, level.finer)):
            if len(columns):
                fitted = vectors.fitted(n, len(columns))
                weigh = weighing(n, fitted.width, scale)[:, None] * cut(diagonals[:, columns], fitted.width)
                runs = cut(plain[:, columns], fitted.width).reshape(-1, fitted.width)
                books.append(Book(columns, fit_tables(runs, weigh.reshape(runs.shape), fitted.bits, generator)))
        return books

    def stored(self, site: Site, level: Codebooks) -> int:
        n, m = site.matrix
        few = level.apart(m)
        rest = Vectored.bytes_of(n, m - few, level.vectors)
        return rest + Vectored.bytes_of(n, few, level.finer) + 4 * few if few else rest


def _scales(weight: Tensor) -> Tensor:
    """The root mean square of each row (n,), as it can be stored; 1 for rows of zeros."""
    size = weight.square().mean(1).sqrt().bfloat16().float()
    return torch.where(size > 0, size, torch.ones_like(size))


def _held(site: Site, level: Codebooks, books: Sequence[Book], codes: Sequence[Codes], scale: Tensor | None, unit: Tensor) -> Packed:
    """The form of weights that are `unit` times what the books hold."""
    n = site.matrix[0]
    whole = len(books) == 1
    forms = []
    for book, found, vectors in zip(books, codes, (level.vectors, level.finer), strict=False):
        c = len(book.columns)
        own = None if scale is None else scale * unit
        tables = [table if scale is not None else table * unit for table in book.tables]
        forms.append(Vectored.of(site.shape if whole else (n, c), vectors.fitted(n, c), found, tables, own))
    return forms[0] if whole else Apart(site.shape, forms[0], forms[1], books[1].columns)
