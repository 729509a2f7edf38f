"""The best low-rank product of a matrix, and feed-forward and attention layers of such products computed tile by tile.

A layer of products y = (x right^T) left has activations as narrow as its rank r between the two; `streamed_feed` and `streamed_attention`
keep those and make what is wide (hidden neurons; queries, keys and values) from them a tile at a time, so that neither is ever whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """matrix (n, m) -> left (n, r), right (r, m), the best rank-r product in the Frobenius norm, the spectrum split evenly."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


class Factors(NamedTuple):
    """y = (x right^T) left + bias: left (r, n), right (r, m), bias (n,) or None; any dtype, x's is computed in."""

    left: Tensor
    right: Tensor
    bias: Tensor | None = None

    def narrow(self, x: Tensor) -> Tensor:
        """x (..., m) -> (..., r)."""
        return x @ self.right.to(x.dtype).T

    def wide(self, p: Tensor, some: slice = slice(None)) -> Tensor:
        """p (..., r) -> (..., n), or some of the n."""
        found = p @ self.left[:, some].to(p.dtype)
        return found if self.bias is None else found.add_(self.bias[some].to(p.dtype))


def streamed_feed(
    x: Tensor,
    ups: Sequence[Factors],
    down: Factors,
    act: Callable[[Tensor], Tensor],
    *,
    tokens: int = 512,
    neurons: int = 512,
    stages: int = 1,
) -> Tensor:
    """down(act(ups[0](x)) * ups[1](x) ...), x (..., m) -> (..., n), of `tokens` rows and `neurons` hidden neurons at a time.

    stages: 2 keeps what the hidden neurons come to in the rank of down, (t, r), and makes the output of all rows of it by one product
    at the end; 1 goes on to the output within the tile and keeps nothing, at the price of a product of fewer rows."""
    rows, hidden = x.reshape(-1, x.shape[-1]), ups[0].left.shape[1]
    width = down.left.shape[1] if stages == 1 else down.left.shape[0]
    # sums in fp32 at least
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(len(rows), width)
    for first in range(0, len(rows), tokens):
        narrow = [up.narrow(rows[first : first + tokens]) for up in ups]
        sums = torch.zeros(len(narrow[0]), down.right.shape[0], dtype=wide, device=x.device)
        for at in range(0, hidden, neurons):
            some = slice(at, at + neurons)
            tile = act(ups[0].wide(narrow[0], some))
            for up, p in zip(ups[1:], narrow[1:], strict=True):
                tile = tile * up.wide(p, some)
            sums += tile @ down.right[:, some].to(x.dtype).T
        out[first : first + tokens] = down.wide(sums.to(x.dtype)) if stages == 1 else sums
    return (out if stages == 1 else down.wide(out)).reshape(*x.shape[:-1], -1)


class Heads(NamedTuple):
    """What attention needs besides its matrices: h heads of queries, k of keys and values; cos and sin (b or 1, t, d) that turn queries and
    keys; mask (b or 1, h or 1, t, t): bool, True is seen, or numbers to be added; causal where there is none."""

    h: int
    k: int
    scale: float
    turn: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    causal: bool = True


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b, h, t, d) with each pair (i, i + d / 2) turned by the angle of cos and sin (b or 1, t, d)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _split(flat: Tensor, heads: int) -> Tensor:
    return flat.unflatten(-1, (heads, -1)).transpose(1, 2)


def streamed_attention(
    x: Tensor, q: Factors, k: Factors, v: Factors, out: Factors, heads: Heads, *, queries: int = 512, keys: int = 512
) -> Tensor:
    """out(softmax(scale q(x) k(x)^T) v(x)), x (b, t, m) -> (b, t, n); queries, keys and values are made of the narrow x right^T a tile at
    a time, keys and values once for each tile of queries, with a running maximum and sum. A query that sees nothing counts as zeros."""
    b, t, _ = x.shape
    narrow = [one.narrow(x) for one in (q, k, v)]
    total = x.new_empty(b, t, out.left.shape[1])
    # sums in fp32 at least
    wide = torch.promote_types(x.dtype, torch.float32)
    for first in range(0, t, queries):
        last = min(first + queries, t)
        asked = _tile(q, narrow[0], first, last, heads.h, heads.turn)
        # heads that share keys lie side by side
        asked = (asked * heads.scale).reshape(b, heads.k, -1, asked.shape[-1])
        served = heads.h // heads.k
        top = torch.full((*asked.shape[:3], 1), float("-inf"), dtype=wide, device=x.device)
        weight, sums = torch.zeros_like(top), None
        for begin in range(0, last if heads.mask is None and heads.causal else t, keys):
            end = min(begin + keys, last if heads.mask is None and heads.causal else t)
            looks = None if heads.mask is None else heads.mask[..., first:last, begin:end]
            if looks is not None and looks.dtype == torch.bool and not looks.any():
                continue
            scores = (asked @ _tile(k, narrow[1], begin, end, heads.k, heads.turn).transpose(-1, -2)).to(wide)
            if heads.mask is None and heads.causal and end > first + 1:
                later = torch.arange(begin, end, device=x.device) > torch.arange(first, last, device=x.device)[:, None]
                scores.unflatten(2, (served, -1)).masked_fill_(later, float("-inf"))
            elif looks is not None:
                grouped = scores.view(b, heads.h, last - first, end - begin)
                grouped.masked_fill_(~looks, float("-inf")) if looks.dtype == torch.bool else grouped.add_(looks)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            # where nothing was seen yet, nothing is subtracted
            by = higher.masked_fill(higher == float("-inf"), 0.0)
            scores.sub_(by).exp_()
            faded = (top - by).exp_()
            weight = weight * faded + scores.sum(-1, keepdim=True)
            found = (scores.to(x.dtype) @ _tile(v, narrow[2], begin, end, heads.k, None)).to(wide)
            sums = found if sums is None else sums.mul_(faded).add_(found)
            top = higher
            del scores
        if sums is None:
            sums = asked.new_zeros(*asked.shape[:3], v.left.shape[1] // heads.k, dtype=wide)
        sums = sums / weight.clamp(min=torch.finfo(wide).tiny)
        line = sums.to(x.dtype).reshape(b, heads.h, last - first, -1).transpose(1, 2).flatten(2)
        total[:, first:last] = out.wide(out.narrow(line))
    return total


def _tile(factors: Factors, narrow: Tensor, first: int, last: int, heads: int, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """Some tokens of all heads, (b, heads, tokens, d)."""
    found = _split(factors.wide(narrow[:, first:last]), heads)
    return found if turn is None else turned(found, *(one[:, first:last] for one in turn))
