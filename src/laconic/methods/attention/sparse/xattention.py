"""XAttention: blocks of keys that the antidiagonals of a prompt's scores say matter, and exact attention over these alone.

Xu et al. 2025, arXiv:2503.16428, sections 2.1 and 2.2.  Tokens in groups of S = `stride`: a group's keys one behind the other, its queries
in reverse order, so that one product of two groups is the sum of an antidiagonal of their S x S tile of q k^T: every token takes part, and
every vertical and slash line of the scores crosses it. Over sqrt(d) S, causal, a softmax over groups of keys; summed within each
block of B x B tokens. A row of blocks keeps the fewest, from the greatest down, that have the share `tau` of the row's sum; the first block
(`sink`) and those that the queries lie in always stay. query (b, h, t, d), key (b, k, s, d) -> (b, h, ceil(t / B), ceil(s / B)).
Scoring takes about 1/S of the work of the scores. Thresholds are one for all heads: the paper's dynamic programme that finds one
for each is not here.  Sibling: attention.exact.lean (decoding, nothing left out)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.core.claim import Card, Paper
from laconic.core.state import Pattern
from laconic.kernels.blocks import reaching, visible

CARD = Card(Paper("Xu et al.", 2025, "arXiv:2503.16428", "sections 2.1 and 2.2"), catalogue="xattention", sibling="attention.exact.lean")

# groups of queries that are scored at once
TOGETHER = 512


def grouped(tokens: Tensor, stride: int, reverse: bool) -> Tensor:
    """(..., t, d) -> (..., ceil(t / S), S d): the tokens of a group one behind the other, or the last one first; zeros behind the end."""
    padded = F.pad(tokens.float(), (0, 0, 0, -tokens.shape[-2] % stride)).unflatten(-2, (-1, stride))
    return (padded.flip(-2) if reverse else padded).flatten(-2)


def antidiagonal(query: Tensor, key: Tensor, stride: int, block: int, scale: float) -> Tensor:
    """Shares of attention by blocks, as the antidiagonals estimate them: query (t, d), key (s, d) of one head -> (ceil(t / B), ceil(s / B))
    fp32, rows of which add up to B / S at most."""
    (t, _), s = query.shape, key.shape[0]
    each = block // stride
    q, k = grouped(query, stride, True), grouped(key, stride, False)
    begins = torch.arange(len(k)) * stride
    found = q.new_zeros(-(-t // block), -(-s // block))
    for first in range(0, len(q), TOGETHER // each * each or each):
        some = q[first : first + (TOGETHER // each * each or each)]
        ends = s - t + (torch.arange(len(some)) + first + 1) * stride
        scores = (some @ k.T * (scale / stride)).masked_fill(begins >= ends[:, None], -torch.inf).softmax(-1)
        # groups of a block, of both
        scores = F.pad(scores, (0, -len(k) % each, 0, -len(some) % each))
        sums = scores.unflatten(0, (-1, each)).unflatten(2, (-1, each)).sum((1, 3))
        found[first // each : first // each + len(sums)] = sums
    return found


@dataclass(frozen=True)
class XAttention(Pattern):
    """tau: the share of a row that is kept; stride: S, which divides `block`; sink: whether the first block always stays."""

    tau: float = 0.9
    stride: int = 8
    block: int = 128
    sink: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau}: a share above 0, at most 1")
        if self.stride < 1 or self.block < 1 or self.block % self.stride:
            raise ValueError(f"stride={self.stride} has to divide block={self.block}")

    def scores(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        """What blocks are kept by: (b, h, ceil(t / B), ceil(s / B))."""
        (b, h, _, d), k = query.shape, key.shape[1]
        by = d**-0.5 if scale is None else scale
        found = [antidiagonal(query[i, j], key[i, j // (h // k)], self.stride, self.block, by) for i in range(b) for j in range(h)]
        return torch.stack(found).unflatten(0, (b, h))

    def __call__(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        seen, own = visible(query.shape[2], key.shape[2], self.block)
        if self.tau == 1:
            return seen.expand(*query.shape[:2], *seen.shape).clone()
        kept = (reaching(self.scores(query, key, scale), self.tau) & seen) | own
        kept[..., 0] |= self.sink
        return kept
