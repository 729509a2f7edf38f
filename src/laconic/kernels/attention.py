"""Softmax attention over rows of unlike length: the plain reference, and `held_attention` over keys and values as a cache holds them.

The native kernels take tiles of tokens one after another, with (m, l, o) = (greatest score, sum of exp(score - m), sum of exp(score - m)
values), so that nothing is unpacked but the few tokens in hand, and share the tiles of all rows and heads out evenly (`lean`). Codes are
multiplied by integers: queries times the scales of a group of keys, and weights times the scales of a value, in steps of the greatest of
them, of 16 bits where queries have no more and twice 16 for fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.core.state import Run
from laconic.kernels.bits import packed_width, unpack
from laconic.kernels.native import native

# tokens of a tile: the state of a tile fits the nearest caches
TILE = 128
# more new tokens than this are better served by products of dense matrices
MOST = 16
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# how devices of other types read the parts of a cache as they are held: filled by what computes there (kernels.gpu.load)
ELSEWHERE: dict[str, Callable[..., Tensor]] = {}


def lean(tiles: Sequence[int], workers: int) -> list[Run]:
    """Tiles of each pair -> runs: all tiles in one line, cut into equal shares wherever a pair ends, none over ceil(sum / workers)."""
    total, runs, begin = sum(tiles), [], 0
    ends = [total * (w + 1) // workers for w in range(workers)]
    worker = 0
    for pair, count in enumerate(tiles):
        at = 0
        while at < count:
            while ends[worker] <= begin + at:
                worker += 1
            stop = min(count, ends[worker] - begin)
            runs.append(Run(worker, pair, at, stop))
            at = stop
        begin += count
    return runs


@dataclass(frozen=True)
class Plain:
    """Tokens as they are: pages (b, k, n, d), all but the last of one width; lengths: tokens of each row."""

    pages: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.lengths

    @property
    def width(self) -> int:
        return self.pages[0].shape[-1]

    def dense(self) -> Tensor:
        return self.pages[0] if len(self.pages) == 1 else torch.cat(self.pages, 2)


@dataclass(frozen=True)
class Grouped:
    """Tokens in codes, x = code * scale + zero, in pages of entries, all but the last of one width; lengths: entries of each row.

    along=False: an entry is a token, codes (b, k, n, 1, ceil(d bits / 8)) uint8, scales and zeros (b, k, n, 1, g) bf16 or fp16, one for
    `group` channels. along=True: an entry is `group` tokens, codes (b, k, n, d, ceil(group bits / 8)), scales and zeros (b, k, n, d, 1)."""

    codes: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    zeros: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    bits: int
    group: int
    along: bool
    width: int

    @property
    def unit(self) -> int:
        return self.group if self.along else 1

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(n * self.unit for n in self.lengths)

    def dense(self) -> Tensor:
        """(b, k, tokens, d) in fp32."""
        codes, scales, zeros = (torch.cat(pages, 2) for pages in (self.codes, self.scales, self.zeros))
        b, k, n, r = codes.shape[:4]
        m = self.unit if self.along else self.width
        # the kernel makes its tensors where the codes are
        with codes.device:
            plain = unpack(codes.reshape(-1, codes.shape[-1]), self.bits, m).reshape(b, k, n, r, m)
        x = dequantize(plain, scales, zeros, self.group)
        return (x.transpose(-1, -2) if self.along else x).reshape(b, k, n * self.unit, self.width)


Part = Plain | Grouped


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """codes (..., m) uint8 in groups along the last axis, the last perhaps shorter, scale and zero (..., g) -> fp32 (..., m)."""
    m, g = codes.shape[-1], scale.shape[-1]
    runs = F.pad(codes, (0, g * group - m)).unflatten(-1, (g, group)).float()
    return runs.mul_(scale.float()[..., None]).add_(zero.float()[..., None]).flatten(-2)[..., :m]


def attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """query (b, h, t, d) of the last t tokens of each row, keys (b, k, s, d), values (b, k, s, e) with h a multiple of k -> (b, h, t, e).

    softmax(scale q kT) v in fp32 (fp64 where queries are), scale 1 / sqrt(d) unless told, each query seeing the first lengths[b] tokens up
    to its own. mask (b, t, s): false where it may not look besides. A query that sees nothing (padding before a row's first) gets zeros."""
    b, h, t, d = query.shape
    k, s = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    ends = torch.tensor(lengths, device=query.device)
    # query j of a row is its token number length - t + j
    own = ends[:, None] - t + torch.arange(t, device=query.device)
    seen = torch.arange(s, device=query.device) <= own[:, :, None]
    if mask is not None:
        seen = seen & mask
    grouped = query.to(wide).reshape(b, k, h // k, t, d)
    scores = torch.einsum("bkgtd,bksd->bkgts", grouped, keys.to(wide)) * (d**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num()
    out = torch.einsum("bkgts,bkse->bkgte", weights, values.to(wide))
    return out.reshape(b, h, t, -1).to(query.dtype)


def held_attention(
    query: Tensor,
    keys: Sequence[Part],
    values: Sequence[Part],
    mask: Tensor | None = None,
    scale: float | None = None,
    schedule: Callable[[Sequence[int], int], list[Run]] = lean,
) -> Tensor:
    """`attention` over parts that follow one another in each row, at most one of them grouped in each half; as they are held on a CPU with
    native kernels, and where ELSEWHERE says how (in its own shares). ValueError for shapes that do not fit, TypeError for other dtypes."""
    if (other := ELSEWHERE.get(query.device.type)) is not None:
        return other(query, keys, values, mask, scale)
    return attended_here(query, keys, values, mask, scale, schedule)


def read_as_held(device: torch.device) -> bool:
    """Whether something on a device reads the parts of a cache as they are held."""
    return device.type in ELSEWHERE or (device.type == "cpu" and native() is not None)


def attended_here(
    query: Tensor,
    keys: Sequence[Part],
    values: Sequence[Part],
    mask: Tensor | None = None,
    scale: float | None = None,
    schedule: Callable[[Sequence[int], int], list[Run]] = lean,
) -> Tensor:
    """`held_attention` by the native kernels, or by torch over dense tensors."""
    lengths = _checked(query, keys, values, mask)
    there, (b, h, t, d), k = native(), query.shape, _heads(keys[0])
    differentiated = query.requires_grad and torch.is_grad_enabled()
    if there is None or differentiated or t > MOST or query.dtype not in TYPES or not query.numel() or _unknown(query, keys, values):
        return attention(query, _dense(keys, query.dtype), _dense(values, query.dtype), lengths, mask, scale)
    unit = max((part.unit for part in keys if isinstance(part, Grouped)), default=1)
    tile = -(-TILE // unit) * unit
    tiles = [-(-n // tile) for n in lengths for _ in range(k)]
    workers = torch.get_num_threads()
    given, out = query.float().contiguous(), torch.empty(b, h, t, values[0].width)
    looks = None if mask is None else mask.contiguous()
    # what was made contiguous lives until the call is over
    held = [[_told(part) for part in half] for half in (keys, values)]
    there.module.attention(
        given.data_ptr(),
        query.dtype == torch.float32,
        [b, h, k, t, d, values[0].width],
        *([told for told, _ in half] for half in held),
        lengths,
        0 if looks is None else looks.data_ptr(),
        d**-0.5 if scale is None else scale,
        tile,
        list(chain.from_iterable(schedule(tiles, workers))),
        out.data_ptr(),
        workers,
        there.level,
    )
    return out.to(query.dtype)


def _first(part: Part) -> Tensor:
    return part.pages[0] if isinstance(part, Plain) else part.codes[0]


def _heads(part: Part) -> int:
    return int(_first(part).shape[1])


def _unknown(query: Tensor, *halves: Sequence[Part]) -> bool:
    """Whether something is not for the native kernels: on another device, or in fp64."""
    held = [(_first(part), isinstance(part, Plain)) for half in halves for part in half]
    return query.device.type != "cpu" or any(one.device.type != "cpu" or (plain and one.dtype not in TYPES) for one, plain in held)


def _dense(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Parts of each row one after the other, (b, k, longest, d)."""
    # as a cache would hand it out: in the dtype of its tokens
    dtype = next((_first(part).dtype for part in parts if isinstance(part, Plain)), dtype)
    dense = [part.dense().to(dtype) for part in parts]
    if all(len(set(part.tokens)) == 1 for part in parts):
        return torch.cat([one[:, :, : part.tokens[0]] for one, part in zip(dense, parts, strict=True)], 2)
    rows = [[one[i, :, : part.tokens[i]] for one, part in zip(dense, parts, strict=True)] for i in range(dense[0].shape[0])]
    return torch.nn.utils.rnn.pad_sequence([torch.cat(row, 1).transpose(0, 1) for row in rows], batch_first=True).transpose(1, 2)


def _told(part: Part) -> tuple[list[int], list[tuple[Tensor, ...]]]:
    """A part as the native kernels read it, and what must not be freed while they do."""
    grouped = isinstance(part, Grouped)
    given = [part.codes, part.scales, part.zeros] if isinstance(part, Grouped) else [part.pages]
    # a long cache has hundreds of pages: no more than this is done for each
    kept = [pages if all(map(Tensor.is_contiguous, pages)) else tuple(page.contiguous() for page in pages) for pages in given]
    places = [map(Tensor.data_ptr, pages) for pages in kept] if grouped else [map(Tensor.data_ptr, kept[0]), repeat(0), repeat(0)]
    most, last = kept[0][0].shape[2], kept[0][-1].shape[2]
    widths = chain(repeat(most, len(kept[0]) - 1), (last,))
    sizes = (part.bits, part.group, part.unit) if isinstance(part, Grouped) else (0, 1, 1)
    kind = TYPES[kept[1 if grouped else 0][0].dtype]
    return [kind, *sizes, part.width, max(1, most), *part.lengths, *chain.from_iterable(zip(*places, widths, strict=False))], kept


def _checked(query: Tensor, keys: Sequence[Part], values: Sequence[Part], mask: Tensor | None) -> tuple[int, ...]:
    """Tokens of each row."""
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; it has to be (rows, heads, tokens, channels)")
    b, h, t, d = query.shape
    if not query.is_floating_point():
        raise TypeError(f"query is {query.dtype}; it has to be a floating point dtype")
    found = []
    for name, half in (("keys", keys), ("values", values)):
        if not half:
            raise ValueError(f"{name} have no part; give at least one")
        if sum(isinstance(part, Grouped) for part in half) > 1:
            raise ValueError(f"{name} have more than one part in codes; one at most is read")
        for part in half:
            _check(name, part, b, _heads(keys[0]), d if name == "keys" else values[0].width)
        found.append(tuple(sum(ends) for ends in zip(*(part.tokens for part in half), strict=True)))
    if h % _heads(keys[0]):
        raise ValueError(f"query has {h} heads, keys have {_heads(keys[0])}; the first has to be a multiple")
    if found[0] != found[1]:
        raise ValueError(f"keys have {list(found[0])} tokens in their rows, values {list(found[1])}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (b, t, max(found[0]))):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it has to be torch.bool of shape {(b, t, max(found[0]))}")
    return found[0]


def _check(name: str, part: Part, b: int, k: int, d: int) -> None:
    """The first and the last page of a part; those between are as wide as the first."""
    if part.width != d:
        raise ValueError(f"{name} have {part.width} channels where {d} are expected")
    if len(part.lengths) != b:
        raise ValueError(f"{name} have {len(part.lengths)} lengths; {b} rows need as many")
    if isinstance(part, Plain):
        kinds: dict[str, tuple[tuple[Tensor, ...], tuple[int, ...], torch.dtype | None]] = {"pages": (part.pages, (d,), None)}
    else:
        if not 1 <= part.bits <= 8 or part.group < 1:
            raise ValueError(f"{name}: bits={part.bits}, group={part.group}; codes have 1 to 8 bits and a group at least one number")
        r, m = (d, part.group) if part.along else (1, d)
        g, stored = -(-m // part.group), part.scales[0].dtype
        if stored not in (torch.bfloat16, torch.float16):
            raise TypeError(f"scales of {name} are {stored}; they have to be torch.bfloat16 or torch.float16")
        kinds = {
            "codes": (part.codes, (r, packed_width(m, part.bits)), torch.uint8),
            "scales": (part.scales, (r, g), stored),
            "zeros": (part.zeros, (r, g), stored),
        }
    widths = None
    for what, (pages, rest, dtype) in kinds.items():
        for page in (pages[0], pages[-1]):
            if (dtype is not None and page.dtype != dtype) or page.dtype != pages[0].dtype:
                raise TypeError(f"{what} of {name} are {page.dtype}; they have to be {dtype or pages[0].dtype}")
            if page.dim() != 3 + len(rest) or page.shape[:2] != (b, k) or page.shape[3:] != rest:
                raise ValueError(f"{what} of {name} have shape {tuple(page.shape)}; they have to be {(b, k, 'n', *rest)}")
        ends = len(pages), pages[0].shape[2], pages[-1].shape[2]
        held = ends[1] * (ends[0] - 1) + ends[2]
        if widths not in (None, ends) or ends[2] > ends[1] or max(part.lengths, default=0) > held or min(part.lengths, default=0) < 0:
            raise ValueError(f"{what} of {name} have {held} entries in {ends[0]} pages for rows of {list(part.lengths)}")
        widths = ends
