"""LR2VQ: vectors of weights are rounded in fewer dimensions than they are long, in a basis of the matrix's own.

Zhu et al. 2022, arXiv:2211.11397:  the N vectors of length `width` that a matrix is cut into are about L B, L (N, rank), B (rank, width),
and rows of L go to the nearest of k entries.  A code names as many weights as before, an entry is `rank` numbers, so in the bytes of a
plain table there is room for more of them. B begins as the first right singular vectors of the vectors, so that errors add up:
|W - Q(L) B|^2 = what the basis leaves out + |L - Q(L)|^2, the first falling with the rank, the second rising, at equal bytes the more
so. `errors` gives both, `predicted` the rank of least sum: before anything is learned.  No data is needed.
weight (n, m) -> codes (n, r), table (k, rank), basis (rank, width); rank = width is product quantization.  Table, basis and codes learn
together afterwards, quantize.train.annealed.  Sibling: quantize.round.vptq (vectors of a column, weighted by the inputs)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Conv, Embedding, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.vectors import kmeans, nearest
from laconic.methods.quantize.grid.spans import Span, Spanned, cut

CARD = Card(Paper("Zhu et al.", 2022, "arXiv:2211.11397"), catalogue="lr2vq", sibling="quantize.round.vptq")


def based(vectors: Tensor, rank: int) -> Tensor:
    """vectors (N, width) -> basis (rank, width), orthonormal, that leaves the least squares out."""
    # of few vectors there may be fewer directions than numbers; the eigenvectors of the Gram matrix are all there
    return torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors.flip(1).T[:rank].float()


def fitted(vectors: Tensor, span: Span, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """vectors (N, width) -> codes (N,), table (k, rank), basis (rank, width) or None, with bf16 values."""
    basis = None
    numbers = vectors
    if span.rank < span.width:
        basis = based(vectors, span.rank).bfloat16().float()
        # the basis as it is stored is orthonormal to rounding
        numbers = vectors @ torch.linalg.pinv(basis)
    table = kmeans(numbers, torch.ones_like(numbers), span.entries, generator).bfloat16().float()
    return nearest(numbers, table), table, basis


class Errors(NamedTuple):
    """Squares that a basis leaves out, and those of what is rounded within it."""

    left: float
    rounded: float

    @property
    def whole(self) -> float:
        """Of the weights."""
        return self.left + self.rounded


def errors(vectors: Tensor, span: Span, generator: torch.Generator) -> Errors:
    """Both parts of the squared error of vectors (N, width)."""
    basis = based(vectors, span.rank)
    numbers = vectors @ basis.T
    table = kmeans(numbers, torch.ones_like(numbers), span.entries, generator)
    rounded = float((numbers - table[nearest(numbers, table)]).square().sum())
    return Errors(float(vectors.square().sum()) - float(numbers.square().sum()), rounded)


def predicted(vectors: Tensor, spans: Iterable[Span], generator: torch.Generator) -> Span:
    """Of levels in as many bytes the one whose squared error is least."""
    return min(spans, key=lambda span: errors(vectors, span, generator).whole)


@dataclass(frozen=True)
class LR2VQ(Transform):
    """seed: of what k-means draws."""

    seed: int = 0

    acts_on = (Linear, Conv, Embedding)
    level = Span

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Span) -> Change:
        n, m = site.matrix
        span = level.fitted(n, m)
        weight = weights["weight"].reshape(n, m).float()
        # a power of two, so that tables in its units lose nothing when they are stored
        unit = weight.square().mean().sqrt().clamp(min=2.0**-100).log2().round().exp2()
        codes, table, basis = fitted(cut(weight / unit, span.width), span, torch.Generator().manual_seed(self.seed))
        return Change(hold={site.tensors["weight"]: Spanned.of(site.shape, span, codes.reshape(n, -1), table * unit, basis)})

    def stored(self, site: Site, level: Span) -> int:
        return Spanned.bytes_of(*site.matrix, level)
