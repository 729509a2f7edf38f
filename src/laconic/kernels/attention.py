"""Softmax attention over rows of unlike length: the plain reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """query (b, h, t, d) of the last t tokens of each row, keys (b, k, s, d), values (b, k, s, e) with h a multiple of k -> (b, h, t, e).

    softmax(q kT / sqrt(d)) v in fp32, each query seeing the first lengths[b] tokens up to its own. mask (b, t, s): false where it may not
    look besides. A query that sees nothing (padding before a row's first token) gets zeros."""
    b, h, t, d = query.shape
    k, s = keys.shape[1:3]
    ends = torch.tensor(lengths, device=query.device)
    # query j of a row is its token number length - t + j
    own = ends[:, None] - t + torch.arange(t, device=query.device)
    seen = torch.arange(s, device=query.device) <= own[:, :, None]
    if mask is not None:
        seen = seen & mask
    grouped = query.float().reshape(b, k, h // k, t, d)
    scores = torch.einsum("bkgtd,bksd->bkgts", grouped, keys.float()) * d**-0.5
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    out = torch.einsum("bkgts,bkse->bkgte", weights, values.float())
    return out.reshape(b, h, t, -1).to(query.dtype)
