"""Attention over held keys and values against the plain reference in fp64, over the sizes where kernels go wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from laconic.kernels import attention as module
from laconic.kernels.attention import Grouped, Part, Plain, attention, held_attention, lean
from laconic.kernels.bits import packed_width
from laconic.kernels.native import LEVELS, Native, native

# a sum of some hundred terms in fp32; results in 16 bits are rounded once more
NEAR = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.fixture(params=[level for level in LEVELS if level not in ("reference", "avx2")])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    there = native()
    if there is None or LEVELS.index(request.param) > LEVELS.index(there.level):
        pytest.skip(f"no {request.param} kernels here")
    monkeypatch.setattr(module, "native", lambda: Native(there.module, request.param))
    return str(request.param)


def paged(data: Tensor, page: int) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in data.split(page, 2))


def plain(draw: torch.Generator, lengths: tuple[int, ...], k: int, d: int, dtype: torch.dtype, page: int = 1 << 20) -> Plain:
    data = torch.randn(len(lengths), k, max(lengths), d, generator=draw) + torch.randn(d, generator=draw)
    return Plain(paged(data.to(dtype), page), lengths)


def grouped(
    draw: torch.Generator,
    lengths: tuple[int, ...],
    k: int,
    d: int,
    bits: int,
    group: int,
    along: bool,
    *,
    half: bool = False,
    page: int = 1 << 20,
) -> Grouped:
    """lengths: entries."""
    r, m = (d, group) if along else (1, d)
    shape, g = (len(lengths), k, max(lengths), r), -(-m // group)
    codes = torch.randint(0, 256, (*shape, packed_width(m, bits)), generator=draw).to(torch.uint8)
    stored = torch.float16 if half else torch.bfloat16
    scales = (torch.rand(*shape, g, generator=draw) * 4 / 2**bits).to(stored)
    zeros = (torch.randn(*shape, g, generator=draw) - 2).to(stored)
    return Grouped(paged(codes, page), paged(scales, page), paged(zeros, page), lengths, bits, group, along, d)


def exact(query: Tensor, keys: list[Part], values: list[Part], mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    def wide(parts: list[Part]) -> list[Part]:
        return [Plain((part.dense().double(),), part.tokens) for part in parts]

    return held_attention(query.double(), wide(keys), wide(values), mask, scale)


def near(query: Tensor, keys: list[Part], values: list[Part], mask: Tensor | None = None, scale: float | None = None) -> None:
    right, found = exact(query, keys, values, mask, scale), held_attention(query, keys, values, mask, scale)
    assert found.dtype == query.dtype and found.shape == right.shape
    error = float((found.double() - right).norm() / right.norm().clamp(min=1e-30))
    assert error < NEAR[query.dtype], error


@pytest.mark.parametrize("bits", [2, 4, 8, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_equal_over_widths_and_groups(level: str, bits: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(bits)
    for d, group in ((128, 32), (64, 64), (40, 16), (80, 128), (5, 32), (16, 8), (256, 32), (264, 32), (64, 48), (32, 256), (96, 32)):
        # rows of unlike length, over the ends of tiles and pages, the last group of a value ragged
        per = -(-170 // group)
        keys: list[Part] = [grouped(draw, (per, 1), 2, d, bits, group, True, page=3), plain(draw, (3, 8), 2, d, dtype)]
        longest = [per * group + 3, group + 8]
        values: list[Part] = [
            grouped(draw, (longest[0] - 5, longest[1] - 8), 2, d, bits, group, False, page=61),
            plain(draw, (5, 8), 2, d, dtype),
        ]
        near(torch.randn(2, 6, 1, d, generator=draw).to(dtype), keys, values)
        # groups the other way round
        near(torch.randn(2, 2, 3, d, generator=draw).to(dtype), values, keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_as_they_are(level: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for d, e, rows, t in itertools.product((1, 7, 32, 48, 128), (5, 64, 96), (1, 2, 3, 7), (1, 2)):
        lengths = (300, 129, 2)
        keys, values = (plain(draw, lengths, 2, width, dtype, page=100) for width in (d, e))
        near(torch.randn(3, 2 * rows, t, d, generator=draw).to(dtype), [keys], [values], scale=0.7 * d**-0.5)


def test_halves_of_a_dtype_of_their_own(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = [grouped(draw, (4,), 2, 64, 4, 32, True, half=True), plain(draw, (30,), 2, 64, torch.float16)]
    values = [grouped(draw, (100,), 2, 64, 2, 32, False, half=True), plain(draw, (58,), 2, 64, torch.float16)]
    for dtype in (torch.float16, torch.float32):
        near(torch.randn(1, 4, 1, 64, generator=draw).to(dtype), list(keys), list(values))


def test_few_tokens_and_none(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = (plain(draw, (1, 0, 3), 2, 8, torch.float32) for _ in range(2))
    query = torch.randn(3, 4, 2, 8, generator=draw)
    out = held_attention(query, [keys], [values])
    torch.testing.assert_close(out, attention(query, keys.pages[0], values.pages[0], keys.lengths))
    # of a row with one token the earlier query is padding; a row with none gives zeros
    assert not out[0, :, 0].any() and not out[1].any()
    torch.testing.assert_close(out[0, :2, 1], values.pages[0][0, :1, 0].expand(2, -1))


def test_masks_and_later_tokens(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    keys: list[Part] = [grouped(draw, (9, 5), 2, 32, 4, 32, True), plain(draw, (3, 100), 2, 32, torch.float32)]
    values: list[Part] = [plain(draw, (291, 260), 2, 32, torch.float32)]
    query = torch.randn(2, 6, 4, 32, generator=draw)
    mask = torch.rand(2, 4, 291, generator=draw) < 0.5
    # whole tiles that are forbidden, and a query that sees nothing
    mask[0, :, :140] = False
    mask[1, 2] = False
    near(query, keys, values, mask)
    assert not held_attention(query, keys, values, mask)[1, :, 2].any()


def test_extreme_values(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for factor in (1e3, 1e5, 1e-6, 0.0):
        keys: list[Part] = [grouped(draw, (8,), 1, 64, 4, 32, True), plain(draw, (14,), 1, 64, torch.float32)]
        values: list[Part] = [grouped(draw, (256,), 1, 64, 4, 32, False), plain(draw, (14,), 1, 64, torch.float32)]
        query = torch.randn(1, 4, 1, 64, generator=draw) * factor
        found, right = held_attention(query, keys, values), exact(query, keys, values)
        assert torch.isfinite(found).all()
        # logits in the thousands have an error of their own in fp32
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5 if factor < 1e4 else 2e-2)
    # one value far above the others leaves those their own precision
    loud = torch.randn(1, 1, 300, 64, generator=draw)
    loud[..., 7] *= 1e4
    near(torch.randn(1, 2, 1, 64, generator=draw), [plain(draw, (300,), 1, 64, torch.float32)], [Plain((loud,), (300,))])
    query[0, 1, 0, 3] = math.nan
    found = held_attention(query, keys, values)
    assert found[0, 1].isnan().any() and torch.isfinite(found[0, 0]).all()


def test_threads_and_schedules_change_no_more_than_rounding(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    keys: list[Part] = [grouped(draw, (30, 2, 11), 2, 64, 4, 32, True)]
    values: list[Part] = [plain(draw, (960, 64, 352), 2, 64, torch.float32)]
    query, before = torch.randn(3, 4, 1, 64, generator=draw), torch.get_num_threads()
    one = held_attention(query, keys, values, schedule=lambda tiles, workers: lean(tiles, 1))
    try:
        for threads in (1, 2, 3, 7, 50):
            torch.set_num_threads(threads)
            torch.testing.assert_close(held_attention(query, keys, values), one, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_differentiable_where_it_must_be() -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = plain(draw, (9,), 1, 8, torch.float32), plain(draw, (9,), 1, 8, torch.float32)
    query = torch.randn(1, 1, 1, 8, generator=draw, requires_grad=True)
    held_attention(query, [keys], [values]).sum().backward()
    assert query.grad is not None and query.grad.any()


def test_wrong_input_is_named() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(1, 4, 1, 8), plain(draw, (9,), 2, 8, torch.float32), plain(draw, (9,), 2, 6, torch.float32)
    codes = grouped(draw, (4,), 2, 8, 4, 4, True)
    for error, says, given in (
        (ValueError, "query has shape", (query[0], [key], [value])),
        (TypeError, r"query is torch\.int64", (query.long(), [key], [value])),
        (ValueError, "keys have 6 channels where 8", (query, [value], [value])),
        (ValueError, "values have no part", (query, [key], [])),
        (ValueError, r"keys have \[18\] tokens in their rows, values \[9\]", (query, [key, key], [value])),
        (ValueError, "query has 3 heads, keys have 2", (query[:, :3], [key], [value])),
        (ValueError, "1 rows need as many", (query, [Plain(key.pages, (9, 9))], [value])),
        (ValueError, "9 entries in 1 pages", (query, [Plain(key.pages, (10,))], [Plain(value.pages, (9,))])),
        (ValueError, "pages of values have shape", (query, [key], [plain(draw, (9,), 3, 6, torch.float32)])),
        (ValueError, "more than one part in codes", (query, [codes, codes], [value])),
        (TypeError, r"codes of keys are torch\.int32", (query, [replace(codes, codes=(codes.codes[0].int(),))], [value])),
        (ValueError, "scales of keys have shape", (query, [replace(codes, scales=(codes.scales[0][..., :4, :],))], [value])),
        (TypeError, r"scales of keys are torch\.float32", (query, [replace(codes, scales=(codes.scales[0].float(),))], [value])),
        (ValueError, "zeros of keys have 3 entries", (query, [replace(codes, zeros=(codes.zeros[0][:, :, :3],))], [value])),
        (ValueError, "bits=9", (query, [replace(codes, bits=9)], [value])),
    ):  # fmt: skip
        with pytest.raises(error, match=says):
            held_attention(*given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask is torch\.bool of shape \(1, 1, 8\)"):
        held_attention(query, [key], [value], torch.ones(1, 1, 8, dtype=torch.bool))


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
kept = []

def bf16(x):
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)

def pages(make, entries, most):
    # each page is its own piece of memory, so that what lies behind it is poisoned
    found = []
    for at in range(0, max(entries, 1), most):
        one = make(min(most, entries - at))
        kept.append(one)
        found.append(one)
    return found

def numbers(b, k, d, lengths, kind):
    most = int(draw.integers(1, 200))
    def make(n):
        x = draw.standard_normal((b, k, n, d), dtype=np.float32)
        return x if kind == 0 else bf16(x) if kind == 1 else x.astype(np.float16)
    told = [kind, 0, 1, 1, d, most, *lengths]
    for page in pages(make, max(lengths), most):
        told += [page.ctypes.data, 0, 0, page.shape[2]]
    return told

def codes(b, k, d, lengths, bits, group, along, kind):
    most, (r, m) = int(draw.integers(1, 200)), ((d, group) if along else (1, d))
    g = -(-m // group)
    told = [kind, bits, group, group if along else 1, d, most, *lengths]
    def small(n):
        x = draw.random((b, k, n, r, g), dtype=np.float32)
        return bf16(x) if kind == 1 else x.astype(np.float16)
    for page in pages(lambda n: draw.integers(0, 256, (b, k, n, r, -(-m * bits // 8)), dtype=np.uint8), max(lengths), most):
        scales, zeros = small(page.shape[2]), small(page.shape[2])
        kept.extend((scales, zeros))
        told += [page.ctypes.data, scales.ctypes.data, zeros.ctypes.data, page.shape[2]]
    return told

def half(b, k, d, lengths):
    if draw.integers(4) == 0:
        return [numbers(b, k, d, lengths, int(draw.integers(3)))], 1
    bits, along = int(draw.choice([1, 2, 3, 4, 5, 8])), bool(draw.integers(2))
    group = int(draw.choice([8, 16, 32, 64, 128, 256, int(draw.integers(2, 70))]))
    unit = group if along else 1
    entries = [int(draw.integers(0, n // unit + 1)) for n in lengths]
    rest = [n - e * unit for n, e in zip(lengths, entries)]
    some = [int(draw.integers(0, n + 1)) for n in rest]
    parts = [codes(b, k, d, entries, bits, group, along, int(draw.integers(1, 3)))]
    return parts + [numbers(b, k, d, few, int(draw.integers(3))) for few in (some, [n - s for n, s in zip(rest, some)])], unit

levels = ["plain", "avx2", "avx512"]
for turn in range(int(sys.argv[3])):
    kept.clear()
    b, k, t = (int(draw.integers(1, top)) for top in (4, 3, 5))
    h, d, e = k * int(draw.integers(1, 7)), *(int(draw.choice([8, 16, 32, 40, 64, 80, 128, int(draw.integers(1, 300))])) for _ in range(2))
    lengths = [int(draw.integers(0, 700)) for _ in range(b)]
    keys, unit = half(b, k, d, lengths)
    values, _ = half(b, k, e, lengths)
    tile = -(-128 // unit) * unit
    workers, runs = int(draw.integers(1, 5)), []
    for row, n in enumerate(lengths):
        for head in range(k):
            tiles = -(-n // tile)
            cut = int(draw.integers(0, tiles + 1))
            for first, last in ((0, cut), (cut, tiles)):
                runs += [int(draw.integers(workers)), row * k + head, first, last] if first < last else []
    query = draw.standard_normal((b, h, t, d), dtype=np.float32)
    mask = draw.integers(0, 2, (b, t, max(lengths)), dtype=np.uint8) if draw.integers(2) else None
    found = []
    for level in levels[: levels.index(module.best()) + 1]:
        for fine in (True, False):
            out = np.full((b, h, t, e), np.nan, np.float32)
            module.attention(query.ctypes.data, fine, [b, h, k, t, d, e], keys, values, lengths, 0 if mask is None else mask.ctypes.data,
                             d ** -0.5, tile, runs, out.ctypes.data, workers, level)
            found.append(out)
    for out in found[1:]:
        assert np.linalg.norm(out - found[0]) <= 2e-3 * np.linalg.norm(found[0]) + 1e-6, (turn, b, h, k, t, d, e, lengths, keys, values)
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 300)
