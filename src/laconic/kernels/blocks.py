"""Attention of a prompt by blocks: which blocks may be seen, and exact attention over those that are kept.

Queries (b, h, t, d) are the last t of s tokens with keys (b, k, s, d), heads h served by k in order. Block i of queries is i B to (i + 1) B
of them, block j of keys tokens j B to (j + 1) B of all.

With AVX-512 keys and values are laid out once, and tiles of queries pass the blocks that are kept with a running maximum and sum, in fp32
or as pairs of bf16; elsewhere torch attends for each block of queries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.native import native

# of the kernel
KNOWN = (torch.float32, torch.bfloat16, torch.float16)
# tokens of a block where all are seen, and pairs of a query and a key below which torch is as quick
DENSE, PAIRS = 128, 1 << 13


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
    seen, own = visible(t, s, block)
    kept = keep.cpu() & seen
    found = _native(query, key, value, kept, block, scale)
    if found is not None:
        return found
    out = query.new_empty(b, h, t, value.shape[3])
    tokens = torch.arange(s, device=query.device)
    for row in range(b):
        for head in range(h):
            keys, values = key[row, head // (h // k)], value[row, head // (h // k)]
            for i, chosen in enumerate(kept[row, head]):
                first, last = i * block, min((i + 1) * block, t)
                found = chosen.nonzero()[:, 0].tolist()
                if not found:
                    out[row, head, first:last] = 0
                    continue
                # what the last block, where it ends behind the last token, is short of
                short = max(0, (found[-1] + 1) * block - s)
                width = len(found) * block - short
                # blocks in a line are a view, others a copy of what is kept
                if len(found) == found[-1] - found[0] + 1:
                    some: slice | Tensor = slice(found[0] * block, found[0] * block + width)
                else:
                    some = torch.cat([tokens[j * block : (j + 1) * block] for j in found])
                # no block but those that the queries lie in holds tokens that come later, and these are the last
                late = int((chosen & own[i]).sum()) * block - short
                mask, sees = None, True
                if late > 0:
                    behind = tokens[some][-late:] <= tokens[first + s - t : last + s - t, None]
                    mask = torch.ones(last - first, width, dtype=torch.bool, device=query.device)
                    mask[:, width - late :] = behind
                    sees = width > late or bool(behind.any(1).all())
                one = query[row, head, first:last][None, None]
                done = F.scaled_dot_product_attention(one, keys[some][None, None], values[some][None, None], mask, scale=scale)[0, 0]
                out[row, head, first:last] = done if sees else done.nan_to_num(0.0)
    return out


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention over all tokens -> (b, h, t, d of values), in query's dtype: by the kernel with every block, or by torch."""
    (b, h, t, _), (_, k, s, _) = query.shape, key.shape
    # with AMX torch multiplies bf16 quicker than the kernel does
    there = native()
    tiles = query.dtype == torch.bfloat16 and there is not None and there.module.pairs() and not there.module.only_pairs()
    if t * s >= PAIRS and not tiles:
        seen, _ = visible(t, s, DENSE)
        found = _native(query, key, value, seen.expand(b, h, *seen.shape), DENSE, scale)
        if found is not None:
            return found
    mask = None if s == t else torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=h != k)


def _native(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, block: int, scale: float | None) -> Tensor | None:
    """By the kernel; None where there is none for this processor, device or dtype, or for gradients."""
    there, tensors = native(), (query, key, value)
    if there is None or there.level != "avx512" or any(x.device.type != "cpu" or x.dtype not in KNOWN for x in tensors):
        return None
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return None
    # in pairs of bf16 where all are and the processor has them, else in fp32
    narrow = all(x.dtype == torch.bfloat16 for x in tensors) and there.module.pairs()
    given = [(x if narrow else x.float()).contiguous() for x in tensors]
    (b, h, t, d), (_, k, s, v) = query.shape, value.shape
    out, looks = torch.empty(b, h, t, v, dtype=given[0].dtype), kept.contiguous()
    there.module.block_attention(
        *(x.data_ptr() for x in given), looks.data_ptr(), [b, h, k, t, s, d, v], block, narrow, d**-0.5 if scale is None else scale,
        out.data_ptr(), torch.get_num_threads(), there.level,
    )  # fmt: skip
    return out.to(query.dtype)
