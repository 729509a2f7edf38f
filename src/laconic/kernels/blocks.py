"""Attention of a prompt by blocks: which blocks may be seen, and exact attention over those that are kept.

Queries (b, h, t, d) are the last t of s tokens with keys (b, k, s, d), heads h served by k in order. Block i of queries is i B to (i + 1) B
of them, block j of keys tokens j B to (j + 1) B of all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reaching(values: Tensor, share: float) -> Tensor:
    """values (..., n) >= 0 -> (..., n) bool: the fewest of a row, from the greatest down, that have `share` of the row's sum; at least one,
    and none that is 0 besides."""
    part = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    ranked, order = part.sort(dim=-1, descending=True, stable=True)
    # what came before it has not reached the share yet
    needed = (ranked.cumsum(-1) - ranked < share - 1e-6) & (ranked > 0)
    needed[..., 0] = True
    return torch.zeros_like(needed).scatter_(-1, order, needed)


def visible(t: int, s: int, block: int) -> tuple[Tensor, Tensor]:
    """Blocks that some query of a block may see, and those of them that hold a query of it: two (ceil(t / B), ceil(s / B)) bool."""
    begins = torch.arange(-(-t // block)) * block + s - t
    ends = (begins + block).clamp(max=s)
    at = torch.arange(-(-s // block)) * block
    seen = at < ends[:, None]
    return seen, seen & (at + block > begins[:, None])


def block_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, block: int, scale: float | None = None) -> Tensor:
    """Causal attention over the blocks that are kept: keep (b, h, ceil(t / B), ceil(s / B)) bool -> (b, h, t, d of values), in query's
    dtype. A query whose own block is not kept may see nothing and then gives zeros. ValueError for other shapes."""
    (b, h, t, _), (_, k, s, _) = query.shape, key.shape
    wide = -(-t // block), -(-s // block)
    if keep.shape != (b, h, *wide) or h % k or s < t or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"keep {tuple(keep.shape)} does not fit queries {tuple(query.shape)} and keys {tuple(key.shape)} in blocks of {block}"
        )
    out = query.new_empty(b, h, t, value.shape[3])
    kept = keep & visible(t, s, block)[0].to(keep.device)
    for row in range(b):
        for head in range(h):
            keys, values = key[row, head // (h // k)], value[row, head // (h // k)]
            for i in range(wide[0]):
                first, last = i * block, min((i + 1) * block, t)
                places = _places(kept[row, head, i], block, s)
                here = torch.cat(places)
                if not len(here):
                    out[row, head, first:last] = 0
                    continue
                # runs of blocks are views, anything else a copy of what is kept
                whole = len(here) == int(here[-1]) - int(here[0]) + 1
                some = slice(int(here[0]), int(here[-1]) + 1) if whole else here
                allowed = here <= torch.arange(first + s - t, last + s - t)[:, None]
                mask = None if bool(allowed.all()) else allowed.to(query.device)
                one = query[row, head, first:last]
                done = F.scaled_dot_product_attention(one[None, None], keys[some][None, None], values[some][None, None], mask, scale=scale)[
                    0, 0
                ]
                out[row, head, first:last] = done.nan_to_num(0.0) if mask is not None and not bool(allowed.any(1).all()) else done
    return out


def _places(kept: Tensor, block: int, s: int) -> list[Tensor]:
    """Tokens of each block that is kept (n,) bool, in order."""
    found = [torch.arange(int(j) * block, min((int(j) + 1) * block, s)) for j in kept.nonzero()[:, 0]]
    return found or [torch.empty(0, dtype=torch.long)]
