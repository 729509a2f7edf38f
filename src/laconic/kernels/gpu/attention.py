"""Attention on a GPU: `held_attention` over keys and values in the codes that a cache holds, and `block_attention` of a prompt.

Decoding has few queries and many tokens, so the tokens are split among programs: each goes through its part in tiles and leaves
(m, l, o) = (greatest score, sum of exp(score - m), sum of exp(score - m) values); a second kernel brings the parts of a query to one m and
adds them, which is exact. Pages of a cache stay where they are: kernels get a list of their addresses. Tokens are rounded to the cache's
dtype as the reference has them; where queries and tokens are of one dtype of 16 bits, weights of values are taken as the sum of two
numbers of that dtype, which is as good as 2^-16. Everything else is the reference's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from laconic.kernels import attention as reference
from laconic.kernels import blocks
from laconic.kernels.attention import MOST, TYPES, Grouped, Part, Plain
from laconic.kernels.bits import packed_width
from laconic.kernels.gpu.numbers import launched, product, rounded, wide

KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# tokens of a tile, the most parts of a row, the most channels, and the most numbers of a program's queries: what shared memory holds
TILE, SPLITS, CHANNELS, QUERIES = 64, 64, 256, 1 << 14


@triton.jit
def _tokens(
    token, channel, seen, row, head, heads, table, pages, page_width, last_width, ends, plain, most,
    KIND: tl.constexpr, STORED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ALONG: tl.constexpr, WIDTH: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Numbers of some tokens of a row and head in KIND: those before `ends` in codes, the others from plain (b, k, most, WIDTH)."""
    after = seen & (token >= ends)
    line = (row * heads + head).to(tl.int64)
    found = tl.load(plain + (line * most + token - ends) * WIDTH + channel, mask=after, other=0)
    if BITS > 0:
        before = seen & (token < ends)
        entry = token // GROUP if ALONG else token
        page = entry // page_width
        width = tl.where(page == pages - 1, last_width, page_width)
        entry = line * width + entry - page * page_width
        if ALONG:
            bit = token % GROUP * BITS
            at, of = (entry * WIDTH + channel) * ROW + (bit >> 3), entry * WIDTH + channel
        else:
            bit = channel * BITS
            at, of = entry * ROW + (bit >> 3), entry * ((WIDTH + GROUP - 1) // GROUP) + channel // GROUP
        there = token < ends
        codes = tl.load(table + page, mask=there, other=0).to(tl.pointer_type(tl.uint8))
        scales = tl.load(table + pages + page, mask=there, other=0).to(tl.pointer_type(STORED))
        zeros = tl.load(table + 2 * pages + page, mask=there, other=0).to(tl.pointer_type(STORED))
        shift = bit & 7
        code = tl.load(codes + at, mask=before, other=0).to(tl.int32)
        if 8 % BITS != 0:
            code |= tl.load(codes + at + 1, mask=before & (shift + BITS > 8), other=0).to(tl.int32) << 8
        code = (code >> shift) & (2**BITS - 1)
        held = code.to(tl.float32) * wide(tl.load(scales + of, mask=before, other=0)) + wide(tl.load(zeros + of, mask=before, other=0))
        found = tl.where(before, rounded(held, KIND), found)
    return found


@triton.jit
def _split(
    query, mask, ends, scale, tops, sums, outs, heads, served, t, columns, span,
    k_table, k_pages, k_page, k_last, k_plain, k_most, v_table, v_pages, v_page, v_last, v_plain, v_most,
    KEY: tl.constexpr, K_STORED: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_ALONG: tl.constexpr, K_WIDTH: tl.constexpr,
    K_ROW: tl.constexpr, VALUE: tl.constexpr, V_STORED: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_ALONG: tl.constexpr,
    V_WIDTH: tl.constexpr, V_ROW: tl.constexpr, D: tl.constexpr, E: tl.constexpr, Q: tl.constexpr, TILE: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """A part of the tokens of one row and KV head, for the Q queries that it serves: tops and sums (b, k, parts, Q), outs
    (b, k, parts, Q, E)."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(0)
    length, k_ends, v_ends = tl.load(ends + row * 3), tl.load(ends + row * 3 + 1), tl.load(ends + row * 3 + 2)
    one = tl.arange(0, Q)
    asked = one < served * t
    d, e = tl.arange(0, D), tl.arange(0, E)
    first_query = ((row * heads + head) * served * t).to(tl.int64)
    q = tl.load(query + (first_query + one[:, None]) * K_WIDTH + d[None, :], mask=asked[:, None] & (d < K_WIDTH)[None, :], other=0)
    own = length - t + one % t
    top = tl.full((Q,), float("-inf"), tl.float32)
    total = tl.zeros((Q,), tl.float32)
    out = tl.zeros((Q, E), tl.float32)
    for first in range(part * span, tl.minimum(length, (part + 1) * span), TILE):
        token = first + tl.arange(0, TILE)
        there = token < length
        key = _tokens(
            token[None, :], d[:, None], there[None, :] & (d < K_WIDTH)[:, None], row, head, heads, k_table, k_pages, k_page, k_last, k_ends,
            k_plain, k_most, KEY, K_STORED, K_BITS, K_GROUP, K_ALONG, K_WIDTH, K_ROW,
        )  # fmt: skip
        zero = tl.zeros((Q, TILE), tl.float32)
        if q.dtype == KEY:
            scores = product(q, key, zero) * scale
        else:
            scores = product(wide(q), wide(key), zero) * scale
        seen = asked[:, None] & there[None, :] & (token[None, :] <= own[:, None])
        if mask is not None:
            looks = tl.load(mask + (row * t + one % t)[:, None] * columns + token[None, :], mask=asked[:, None] & there[None, :], other=0)
            seen = seen & (looks != 0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # where nothing was seen yet, nothing is subtracted
        by = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - by[:, None])
        faded = tl.exp(top - by)
        total = total * faded + tl.sum(weights, 1)
        value = _tokens(
            token[:, None], e[None, :], there[:, None] & (e < V_WIDTH)[None, :], row, head, heads, v_table, v_pages, v_page, v_last, v_ends,
            v_plain, v_most, VALUE, V_STORED, V_BITS, V_GROUP, V_ALONG, V_WIDTH, V_ROW,
        )  # fmt: skip
        out = out * faded[:, None]
        if not NARROW:
            out = product(weights, wide(value), out)
        else:
            near = rounded(weights, VALUE)
            out = product(rounded(weights - wide(near), VALUE), value, product(near, value, out))
        top = higher
    place = ((row * heads + head) * parts + part) * Q + one
    tl.store(tops + place, top)
    tl.store(sums + place, total)
    tl.store(outs + place[:, None].to(tl.int64) * E + e[None, :], out)


@triton.jit
def _joined(tops, sums, outs, out, heads, served, t, parts, WIDTH: tl.constexpr, E: tl.constexpr, Q: tl.constexpr, PARTS: tl.constexpr):
    """The parts of one query brought together, out (b, h, t, WIDTH)."""
    query, line = tl.program_id(0), tl.program_id(1)
    part, e = tl.arange(0, PARTS), tl.arange(0, E)
    place = (line * parts + part) * Q + query
    top = tl.load(tops + place, mask=part < parts, other=float("-inf"))
    highest = tl.max(top, 0)
    by = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(tl.load(sums + place, mask=part < parts, other=0.0) * by, 0)
    some = tl.load(outs + place[:, None].to(tl.int64) * E + e[None, :], mask=(part < parts)[:, None], other=0.0)
    found = tl.sum(some * by[:, None], 0)
    # a query that saw nothing, or scores that are no numbers: the reference gives all tokens the weight 0
    found = tl.where(total > 0, found / tl.where(total > 0, total, 1.0), 0.0)
    at = out + (line * served * t + query).to(tl.int64) * WIDTH + e
    tl.store(at, rounded(found, out.dtype.element_ty), mask=e < WIDTH)


@triton.jit
def _kept_blocks(
    query, key, value, order, counts, out, scale, heads, served, t, s, block, over,
    D: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M queries of one block over the blocks that it keeps; `over` such tiles make a block of queries."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = tile // over
    line = at * block + tile % over * M + tl.arange(0, M)
    given = line < tl.minimum(t, (at + 1) * block)
    d, e = tl.arange(0, D), tl.arange(0, E)
    first = (row * heads + head).to(tl.int64)
    behind = (row * (heads // served) + head // served).to(tl.int64) * s
    q = tl.load(query + (first * t + line)[:, None] * WIDTH + d[None, :], mask=given[:, None] & (d < WIDTH)[None, :], other=0)
    across = tl.cdiv(t, block)
    listed = order + (first * across + at) * tl.cdiv(s, block)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    found = tl.zeros((M, E), tl.float32)
    for i in range(tl.load(counts + first * across + at)):
        begin = tl.load(listed + i) * block
        for inner in range(begin, tl.minimum(s, begin + block), N):
            token = inner + tl.arange(0, N)
            there = token < tl.minimum(s, begin + block)
            keys = tl.load(key + (behind + token)[None, :] * WIDTH + d[:, None], mask=there[None, :] & (d < WIDTH)[:, None], other=0)
            scores = product(q, keys, tl.zeros((M, N), tl.float32)) * scale
            scores = tl.where(there[None, :] & (token[None, :] <= (line + s - t)[:, None]), scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            by = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - by[:, None])
            faded = tl.exp(top - by)
            total = total * faded + tl.sum(weights, 1)
            values = tl.load(
                value + (behind + token)[:, None] * V_WIDTH + e[None, :], mask=there[:, None] & (e < V_WIDTH)[None, :], other=0
            )
            found = product(rounded(weights, value.dtype.element_ty), values, found * faded[:, None])
            top = higher
    nothing = (total == 0)[:, None]
    found = tl.where(nothing, 0.0, found / tl.where(nothing, 1.0, total[:, None]))
    place = out + (first * t + line)[:, None] * V_WIDTH + e[None, :]
    tl.store(place, rounded(found, out.dtype.element_ty), mask=given[:, None] & (e < V_WIDTH)[None, :])


def held_attention(
    query: Tensor, keys: Sequence[Part], values: Sequence[Part], mask: Tensor | None = None, scale: float | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.attention.held_attention` where a half begins with a part in codes; splits: parts of a row, by default so many that all
    multiprocessors have some. ValueError and TypeError as there."""
    if not _reads(query, keys, values):
        return reference.attended_here(query, keys, values, mask, scale)
    lengths = reference._checked(query, keys, values, mask)
    (b, h, t, d), k = query.shape, reference._heads(keys[0])
    served, e = h // k, values[0].width
    q, wide_e = max(16, triton.next_power_of_2(h // k * t)), max(16, triton.next_power_of_2(e))
    # tiles of fp32 are twice as large
    tile = TILE if query.dtype != torch.float32 else TILE // 2
    tiles = triton.cdiv(max(lengths), tile)
    parts = max(1, min(SPLITS, tiles, splits or triton.cdiv(2 * _multiprocessors(query), b * k)))
    held, ends = [], [list(lengths)]
    words: dict[str, object] = {}
    for name, kind, half in (("K", "KEY", keys), ("V", "VALUE", values)):
        given, told, until = _half(half, query, name, kind)
        held.append(given)
        words |= told
        ends.append(until)
    numbers = torch.tensor(ends, dtype=torch.int32, device="cpu").T.contiguous().to(query.device)
    tops, sums = (query.new_empty(b, k, parts, q, dtype=torch.float32) for _ in range(2))
    outs, out = query.new_empty(b, k, parts, q, wide_e, dtype=torch.float32), query.new_empty(b, h, t, e)
    looks = None if mask is None else mask.contiguous().view(torch.uint8)
    sizes = {"D": max(16, triton.next_power_of_2(d)), "E": wide_e, "Q": q, "TILE": tile}
    sizes["NARROW"] = query.dtype != torch.float32 and words["VALUE"] != tl.float32
    with launched(query):
        _split[(parts, k, b)](
            query.contiguous(), looks, numbers, d**-0.5 if scale is None else scale, tops, sums, outs, k, served, t, max(lengths),
            triton.cdiv(tiles, parts) * tile, *held[0], *held[1], **words, **sizes, num_warps=4, num_stages=1,
        )  # fmt: skip
        _joined[(served * t, b * k)](
            tops, sums, outs, out, k, served, t, parts, WIDTH=e, E=wide_e, Q=q, PARTS=triton.next_power_of_2(parts), num_warps=4
        )
    return out


def _reads(query: Tensor, keys: Sequence[Part], values: Sequence[Part]) -> bool:
    """Whether the kernels read these parts: one device, codes in the first part of a half alone, few new tokens."""
    halves = [part for half in (keys, values) for part in half]
    if query.dim() != 4 or not all((keys, values)) or any(isinstance(part, Grouped) for half in (keys, values) for part in half[1:]):
        return False
    first = [reference._first(part) for part in halves]
    plain = all(one.dtype in TYPES for one, part in zip(first, halves, strict=True) if isinstance(part, Plain))
    queries = max(16, triton.next_power_of_2(max(1, query.shape[1] // max(1, first[0].shape[1]) * query.shape[2])))
    wide_d = max(16, triton.next_power_of_2(max(part.width for part in halves)))
    return (
        any(isinstance(part, Grouped) for part in halves) and plain and query.dtype in TYPES and query.numel() > 0
        and query.shape[2] <= MOST and wide_d <= CHANNELS and queries * wide_d <= QUERIES and min(part.width for part in halves) > 0
        and all(one.device == query.device for one in first) and not (query.requires_grad and torch.is_grad_enabled())
    )  # fmt: skip


def _half(half: Sequence[Part], query: Tensor, name: str, kind: str) -> tuple[tuple[object, ...], dict[str, object], list[int]]:
    """Keys or values as a kernel gets them: addresses of pages, how many, their entries, those of the last, tokens as they are and how
    many columns these have; what the kernel is compiled for; where each row's codes end."""
    head, rest = half[0], [part for part in half if isinstance(part, Plain)]
    dtype = next((reference._first(part).dtype for part in rest), query.dtype)
    b, k = len(head.lengths), reference._heads(head)
    plain = reference._dense(rest, dtype).contiguous() if rest else query.new_zeros(b, k, 1, head.width, dtype=dtype)
    if not plain.shape[2]:
        plain = query.new_zeros(b, k, 1, head.width, dtype=dtype)
    words: dict[str, object] = {kind: KINDS[dtype], f"{name}_WIDTH": head.width}
    if not isinstance(head, Grouped):
        words |= {f"{name}_STORED": tl.bfloat16, f"{name}_BITS": 0, f"{name}_GROUP": 1, f"{name}_ALONG": False, f"{name}_ROW": 1}
        return (None, 1, 1, 1, plain, plain.shape[2]), words, [0] * b
    tensors = [
        tuple(page if page.is_contiguous() else page.contiguous() for page in pages) for pages in (head.codes, head.scales, head.zeros)
    ]
    places = torch.tensor([[page.data_ptr() for page in pages] for pages in tensors], dtype=torch.int64, device="cpu").to(query.device)
    # what was made contiguous lives as long as its address is in use
    places.pages = tensors  # type: ignore[attr-defined]
    m = head.group if head.along else head.width
    words |= {f"{name}_STORED": KINDS[head.scales[0].dtype], f"{name}_BITS": head.bits, f"{name}_GROUP": head.group}
    words |= {f"{name}_ALONG": head.along, f"{name}_ROW": packed_width(m, head.bits)}
    widths = max(1, head.codes[0].shape[2]), max(1, head.codes[-1].shape[2])
    return (places, len(head.codes), *widths, plain, plain.shape[2]), words, list(head.tokens)


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def block_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, block: int, scale: float | None = None) -> Tensor:
    """`kernels.blocks.block_attention`, its shapes and its ValueError."""
    (b, h, t, d), (_, k, s, _), e = query.shape, key.shape, value.shape[-1]
    tensors = query, key, value
    grows = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    across = triton.cdiv(t, block), triton.cdiv(s, block)
    odd = keep.shape != (b, h, *across) or h % k or s < t or value.shape[:3] != key.shape[:3]
    if odd or grows or query.dtype not in KINDS or len({x.dtype for x in tensors}) > 1 or not query.numel() or not 0 < e <= CHANNELS >= d:
        return blocks.block_attention(query, key, value, keep, block, scale)
    seen, _ = blocks.visible(t, s, block)
    kept = keep & seen.to(keep.device)
    # the blocks of each row that are kept, one behind the other
    order = kept.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int32).to(query.device).contiguous()
    counts = kept.sum(-1, dtype=torch.int32).to(query.device).contiguous()
    out = query.new_empty(b, h, t, e)
    most = (32 if query.dtype == torch.float32 else 64) // (2 if max(d, e) > 128 else 1)
    m = n = min(most, max(16, triton.next_power_of_2(block)))
    over = triton.cdiv(block, m)
    sizes = {"D": max(16, triton.next_power_of_2(d)), "E": max(16, triton.next_power_of_2(e)), "WIDTH": d, "V_WIDTH": e, "M": m, "N": n}
    with launched(query):
        _kept_blocks[(across[0] * over, h, b)](
            *(x.contiguous() for x in tensors), order, counts, out, d**-0.5 if scale is None else scale, h, h // k, t, s, block, over,
            **sizes, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
