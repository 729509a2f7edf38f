"""BitStack: a matrix as a stack of blocks of about one bit a weight each, of which any first few stand for it.

Wang et al. 2024, arXiv:2410.23918, section 3: W' = W diag(s), s_j the mean over calibration sequences of the norm of input channel j plus
1e-3; R = W', then n times: S = sign(R), U V the best rank-k product for |R|, R -= S * (U V). Block i is S in one bit and U, V in fp16;
W is about (sum over the first blocks of S * (U V)) diag(1/s). The paper has n = k = 16.
weight (n, m), norms (m,), Stack -> Scaled(Sum(Signed, ...), 1/s): 1/s is held beside the blocks where the paper folds it into the layer
before, which is the same function. s is taken relative to the largest scaled weight, which changes no block and keeps fp16 in range.
The rank is cut, to 1 at the least, where the factors of a block would take more than `share` of the bytes of its signs: the paper's own
share at 4,096 is 1/8, and on a matrix of 256 x 256 sixteen factors would weigh twice as much as the signs. Residuals are of what is
stored, so that a block makes up for the rounding of those before it.
Sibling: quantize.residual.lorc (one low-rank correction, at one size)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Scaled, Sum
from laconic.core.site import Linear, Site
from laconic.core.statistic import Norms
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.lowrank import low_rank
from laconic.methods.nest.bits.signed import Signed

CARD = Card(Paper("Wang et al.", 2024, "arXiv:2410.23918", "section 3"), catalogue="bitstack", sibling="quantize.residual.lorc")

# added to the norm of a channel
FLOOR = 1e-3


@dataclass(frozen=True)
class Stack:
    """Level: how many blocks, and the rank of their magnitudes; share: most bytes of a block's factors over those of its signs."""

    blocks: int = 16
    rank: int = 16
    share: float = 0.25

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.rank < 1:
            raise ValueError(f"blocks={self.blocks}, rank={self.rank}: a stack has at least one block of rank 1")

    def rank_of(self, n: int, m: int) -> int:
        """The rank that an (n, m) matrix gets."""
        return max(1, min(self.rank, n, m, int(self.share * n * m / (16 * (n + m)))))


def factor_of(weight: Tensor, norms: Tensor) -> Tensor:
    """weight (n, m), norms (m,) -> 1/s (m,) in bf16, such that the largest entry of W diag(s) is about 1."""
    s = norms + FLOOR
    top = (weight * s).abs().amax()
    s = s / torch.where(top > 0, top, torch.ones_like(top))
    tiny = torch.finfo(torch.bfloat16).tiny
    return (1 / s).clamp(tiny, 1 / tiny).to(torch.bfloat16)


def peel(weight: Tensor, rank: int) -> Iterator[Signed]:
    """weight (n, m), scaled -> blocks without end, each of what those before it left over."""
    rest = weight.float()
    while True:
        left, right = low_rank(rest.abs(), rank)
        block = Signed.of(rest >= 0, left, right)
        rest = rest - block.dense()
        yield block


@dataclass(frozen=True)
class BitStack(Transform):
    """No knobs; how far to go is the level."""

    acts_on = (Linear,)
    level = Stack
    wants = (Norms(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Stack) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Stack]) -> Iterator[Change]:
        """Levels of one rank share their blocks."""
        weight = weights["weight"].reshape(site.matrix).float()
        factor = factor_of(weight, stats[Norms()])
        scaled = weight / factor.float()
        begun: dict[int, tuple[Iterator[Signed], list[Signed]]] = {}
        for level in levels:
            rank = level.rank_of(*site.matrix)
            more, blocks = begun.setdefault(rank, (peel(scaled, rank), []))
            while len(blocks) < level.blocks:
                blocks.append(next(more))
            yield Change(hold={site.tensors["weight"]: Scaled(Sum(*blocks[: level.blocks]), factor)})

    def stored(self, site: Site, level: Stack) -> int:
        n, m = site.matrix
        return level.blocks * Signed.bytes_of(n, m, level.rank_of(n, m)) + 2 * m
