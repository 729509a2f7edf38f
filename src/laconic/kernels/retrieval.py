"""Nearest neighbours by cosine, exactly: how much of them is found again with shorter vectors, and shortlists that are ranked anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# similarities that are in memory at once (fp32: 64 MB)
CHUNK = 16 * 1024 * 1024


def nearest(queries: Tensor, corpus: Tensor, k: int, own: Tensor | None = None) -> Tensor:
    """queries (q, m), corpus (n, m), both in any length -> indices (q, k) of the corpus, by cosine, the nearest first; ties to no one in
    particular. own (q,): the index of each query in the corpus, which is no neighbour of itself."""
    table = F.normalize(corpus.float(), dim=1)
    step = max(1, CHUNK // max(1, table.shape[0]))
    found = []
    for start in range(0, queries.shape[0], step):
        score = F.normalize(queries[start : start + step].float(), dim=1) @ table.T
        if own is not None:
            score.scatter_(1, own[start : start + step, None], -torch.inf)
        found.append(score.topk(k, dim=1).indices)
    return torch.cat(found)


def overlap(found: Tensor, wanted: Tensor) -> Tensor:
    """Two sets of indices (q, k) -> (q,) the share of the wanted that is found: recall at k of each query."""
    return (found[:, :, None] == wanted[:, None, :]).any(1).double().mean(1)


def funnel(queries: Tensor, corpus: Tensor, sizes: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Shortlists by growing prefixes: all of the corpus by the first sizes[0] numbers, the best keep[0] of them by sizes[1], and so on.
    queries (q, m), corpus (n, m) -> indices (q, keep[-1]), the nearest first. Kusupati et al. 2022, arXiv:2205.13147, section 4.3.1."""
    listed = nearest(queries[:, : sizes[0]], corpus[:, : sizes[0]], min(keep[0], corpus.shape[0]))
    for size, count in zip(sizes[1:], keep[1:], strict=True):
        rows = F.normalize(corpus[listed][..., :size].float(), dim=-1)
        score = torch.einsum("qkm,qm->qk", rows, F.normalize(queries[:, :size].float(), dim=1))
        listed = listed.gather(1, score.topk(min(count, listed.shape[1]), dim=1).indices)
    return listed


def cascade(logits: Sequence[Tensor], sizes: Sequence[int], threshold: float) -> tuple[Tensor, Tensor]:
    """Logits (b, classes) of each growing prefix -> (choices (b,), numbers of the prefix that each was taken with (b,)): the first prefix
    whose likeliest class reaches `threshold`, else the last. Kusupati et al. 2022, arXiv:2205.13147, section 4.2.1."""
    choice, used = logits[-1].argmax(1), torch.full((logits[-1].shape[0],), sizes[-1])
    for one, size in zip(reversed(logits[:-1]), reversed(sizes[:-1]), strict=True):
        sure = one.softmax(1).amax(1) >= threshold
        choice, used = torch.where(sure, one.argmax(1), choice), torch.where(sure, torch.full_like(used, size), used)
    return choice, used
