"""Products with a matrix of codes as it is stored, and the matrix itself: the operators of `kernels.linear` and `kernels.lookup` on a GPU.

A row's codes come in runs, the fewest that fill whole bytes (2 codes of 4 bits, 8 of 3). Code i of each run is taken together with input i
of each: bytes are read side by side, and nothing is shuffled. One row of x: products of codes are summed in fp32 and scaled a group at a
time, so weights are not rounded. More rows: tiles of the matrix are decoded, rounded to x's dtype as the reference has them, and
multiplied with sums in fp32. Gradients, and what is empty or of another dtype, are the reference's."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from laconic.kernels import linear, lookup
from laconic.kernels.gpu.numbers import launched, product, rounded, small_float, wide
from laconic.kernels.levels import FLOATS, Levels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# columns of a program that makes rows dense
COLUMNS = 1024


class Stored(NamedTuple):
    """A matrix (n, m): its tensors, weights of a group, and what kernels are compiled for."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
    m: int
    group: int
    words: dict[str, Any]

    @property
    def given(self) -> tuple[Any, ...]:
        """Tensors with the strides of their rows, n, m, runs of a row and group, in the order of every kernel."""
        codes, scales, zeros, whole, table = self.tensors
        step = 0 if zeros is None else zeros.stride(0)
        runs = triton.cdiv(self.m, self.words["PER"])
        return codes, codes.stride(0), scales, scales.stride(0), zeros, step, whole, table, codes.shape[0], self.m, runs, self.group


@triton.jit
def _scales(at, seen, whole, SCALE: tl.constexpr):
    """Scales fp32 from where they are stored."""
    stored = tl.load(at, mask=seen, other=0)
    if SCALE == "e8m0":
        found = tl.maximum(stored.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        found = small_float(stored.to(tl.int32), 8, 4, 1) * tl.load(whole)
    else:
        found = wide(stored)
    return found


@triton.jit
def _zeros(zeros, start, group, seen, BITS: tl.constexpr, HALF: tl.constexpr):
    """Zeros fp32 of groups; start: where their rows begin."""
    if zeros is None:
        found = tl.full(group.shape, 2.0 ** (BITS - 1) - 0.5 * HALF, tl.float32)
    else:
        SIZE: tl.constexpr = BITS + HALF
        shift = (group * SIZE) & 7
        at = zeros + start + ((group * SIZE) >> 3)
        pair = tl.load(at, mask=seen, other=0).to(tl.int32) | (tl.load(at + 1, mask=seen & (shift + SIZE > 8), other=0).to(tl.int32) << 8)
        found = ((pair >> shift) & (2**SIZE - 1)).to(tl.float32) * (1.0 / (1 + HALF))
    return found


@triton.jit
def _values(code, seen, table, BITS: tl.constexpr, VALUE: tl.constexpr, E: tl.constexpr, ODD: tl.constexpr):
    """What codes stand for before a zero is taken off and a scale comes in, fp32."""
    if VALUE == "table":
        found = wide(tl.load(table + code, mask=seen, other=0))
    elif VALUE == "float":
        found = small_float(code, BITS, E, ODD)
    else:
        found = code.to(tl.float32)
    return found


@triton.jit
def _taken(run, first, seen, PLACE: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Code PLACE of each run, from where the runs begin and their first bytes."""
    SHIFT: tl.constexpr = PLACE * BITS % 8
    at = run + PLACE * BITS // 8
    if BYTES == 1:
        code = first.to(tl.int32) >> SHIFT
    else:
        code = tl.load(at, mask=seen, other=0).to(tl.int32) >> SHIFT
    if SHIFT + BITS > 8:
        code |= tl.load(at + 1, mask=seen, other=0).to(tl.int32) << (8 - SHIFT)
    return code & (2**BITS - 1)


@triton.jit
def _dense(
    codes, s_codes, scales, s_scales, zeros, s_zeros, whole, table, n, m, runs, group, out,
    BITS: tl.constexpr, VALUE: tl.constexpr, E: tl.constexpr, ODD: tl.constexpr, HALF: tl.constexpr, SCALE: tl.constexpr,
    PER: tl.constexpr, BYTES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row's part of the matrix, out (n, m) fp32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = column < m
    shift = (column * BITS) & 7
    at = codes + row * s_codes + ((column * BITS) >> 3)
    code = tl.load(at, mask=seen, other=0).to(tl.int32)
    if 8 % BITS != 0:
        code |= tl.load(at + 1, mask=seen & (shift + BITS > 8), other=0).to(tl.int32) << 8
    code = (code >> shift) & (2**BITS - 1)
    value = _values(code, seen, table, BITS, VALUE, E, ODD)
    if VALUE == "grid":
        value -= _zeros(zeros, row * s_zeros, column // group, seen, BITS, HALF)
    scale = _scales(scales + row * s_scales + column // group, seen, whole, SCALE)
    tl.store(out + row * m + column, value * scale, mask=seen)


@triton.jit
def _one(
    codes, s_codes, scales, s_scales, zeros, s_zeros, whole, table, n, m, runs, group, x, s_x, out,
    BITS: tl.constexpr, VALUE: tl.constexpr, E: tl.constexpr, ODD: tl.constexpr, HALF: tl.constexpr, SCALE: tl.constexpr,
    PER: tl.constexpr, BYTES: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """N outputs of one row x (m,), out (n,): PARTS times RUNS runs at a time; EVEN: those of a part lie in one group."""
    row = tl.program_id(0) * N + tl.arange(0, N)
    here = row < n
    row = row.to(tl.int64)
    sums = tl.zeros((N, PARTS, RUNS), tl.float32)
    for first in range(0, runs, PARTS * RUNS):
        part = first + tl.arange(0, PARTS) * RUNS
        run = part[:, None] + tl.arange(0, RUNS)[None, :]
        place = codes + row[:, None, None] * s_codes + run[None, :, :] * BYTES
        byte = tl.load(place, mask=here[:, None, None] & (run < runs)[None, :, :], other=0)
        some = tl.zeros((N, PARTS, RUNS), tl.float32)
        if EVEN:
            of = (part * PER // group)[None, :]
            known = here[:, None] & (part * PER < m)[None, :]
            scale = _scales(scales + row[:, None] * s_scales + of, known, whole, SCALE)[:, :, None]
            zero = 0.0
            if VALUE == "grid":
                zero = _zeros(zeros, row[:, None] * s_zeros, of, known, BITS, HALF)[:, :, None]
        for i in tl.static_range(PER):
            column = run * PER + i
            seen = here[:, None, None] & (column < m)[None, :, :]
            value = _values(_taken(place, byte, seen, i, BITS, BYTES), seen, table, BITS, VALUE, E, ODD)
            if EVEN:
                value -= zero
            else:
                of = (column // group)[None, :, :]
                if VALUE == "grid":
                    value -= _zeros(zeros, row[:, None, None] * s_zeros, of, seen, BITS, HALF)
                value *= _scales(scales + row[:, None, None] * s_scales + of, seen, whole, SCALE)
            some += tl.where(seen, value, 0.0) * wide(tl.load(x + column * s_x, mask=column < m, other=0))[None, :, :]
        sums += some * scale if EVEN else some
    found = tl.sum(tl.sum(sums, 2), 1)
    tl.store(out + row, rounded(found, out.dtype.element_ty), mask=here)


@triton.jit
def _many(
    codes, s_codes, scales, s_scales, zeros, s_zeros, whole, table, n, m, runs, group, x, s_row, s_place, s_run, out, rows,
    BITS: tl.constexpr, VALUE: tl.constexpr, E: tl.constexpr, ODD: tl.constexpr, HALF: tl.constexpr, SCALE: tl.constexpr,
    PER: tl.constexpr, BYTES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of M rows and N outputs, out (rows, n): RUNS runs at a time; EVEN: they lie in one group."""
    line = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1) * N + tl.arange(0, N)
    given, here = line < rows, row < n
    line, row = line.to(tl.int64), row.to(tl.int64)
    sums = tl.zeros((M, N), tl.float32)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        place = codes + row[None, :] * s_codes + run[:, None] * BYTES
        byte = tl.load(place, mask=here[None, :] & (run < runs)[:, None], other=0)
        if EVEN:
            of = tl.zeros((N,), tl.int32) + first * PER // group
            scale = _scales(scales + row * s_scales + of, here, whole, SCALE)[None, :]
            zero = 0.0
            if VALUE == "grid":
                zero = _zeros(zeros, row * s_zeros, of, here, BITS, HALF)[None, :]
        for i in tl.static_range(PER):
            column = run * PER + i
            seen = (column < m)[:, None] & here[None, :]
            value = _values(_taken(place, byte, seen, i, BITS, BYTES), seen, table, BITS, VALUE, E, ODD)
            if EVEN:
                value = (value - zero) * scale
            else:
                of = (column // group)[:, None]
                if VALUE == "grid":
                    value -= _zeros(zeros, row[None, :] * s_zeros, of, seen, BITS, HALF)
                value *= _scales(scales + row[None, :] * s_scales + of, seen, whole, SCALE)
            weight = rounded(tl.where(seen, value, 0.0), x.dtype.element_ty)
            # x has zeros behind its end
            some = x + line[:, None] * s_row + i * s_place + run[None, :] * s_run
            sums = product(tl.load(some, mask=given[:, None] & (run < runs)[None, :], other=0), weight, sums)
    tl.store(out + line[:, None] * n + row[None, :], rounded(sums, out.dtype.element_ty), mask=given[:, None] & here[None, :])


@lru_cache(maxsize=1024)
def _tiles(per: int, group: int, m: int, most: int, least: int) -> tuple[int, bool]:
    """Runs of a part, a power of two from `least` to `most`, and whether such parts always lie in one group."""
    whole = most if group >= m else group // per if group % per == 0 else 1
    runs = min(most, whole & -whole)
    return max(runs, least), runs >= least


def linear_of(x: Tensor, stored: Stored) -> Tensor:
    """x (..., m) times the transposed matrix -> (..., n) in x's dtype; nothing may be empty."""
    codes, (m, per) = stored.tensors[0], (stored.m, stored.words["PER"])
    n, flat = codes.shape[0], x.reshape(-1, stored.m)
    rows = flat.shape[0]
    out = x.new_empty(rows, n)
    with launched(x):
        if rows == 1:
            runs, even = _tiles(per, stored.group, m, 128, 4)
            tiles = {"N": 8, "PARTS": 256 // runs, "RUNS": runs, "EVEN": even}
            _one[(triton.cdiv(n, 8),)](*stored.given, flat, flat.stride(1), out, **stored.words, **tiles, num_warps=4)
        else:
            # without tensor cores, products of fp32 want small tiles
            most, wide_n = (32, 32) if x.dtype == torch.float32 else (64, 64)
            runs, even = _tiles(per, stored.group, m, most, 16)
            if per > 1:
                # input i of all runs side by side
                flat = torch.nn.functional.pad(flat, (0, -m % per)).unflatten(1, (-1, per)).transpose(1, 2).contiguous()
                steps = flat.stride()
            else:
                steps = (flat.stride(0), 0, flat.stride(1))
            tile = min(most, max(16, triton.next_power_of_2(rows)))
            tiles = {"M": tile, "N": wide_n, "RUNS": runs, "EVEN": even}
            _many[(triton.cdiv(rows, tile), triton.cdiv(n, wide_n))](
                *stored.given, flat, *steps, out, rows, **stored.words, **tiles, num_warps=4
            )
    return out.reshape(*x.shape[:-1], n)


def dense_of(stored: Stored) -> Tensor:
    """The matrix itself, (n, m) fp32; nothing may be empty."""
    codes = stored.tensors[0]
    out = codes.new_empty(codes.shape[0], stored.m, dtype=torch.float32)
    with launched(codes):
        _dense[(codes.shape[0], triton.cdiv(stored.m, COLUMNS))](*stored.given, out, **stored.words, COLUMNS=COLUMNS, num_warps=4)
    return out


def _stored(
    m: int, bits: int, group: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None, whole: Tensor | None = None,
    table: Tensor | None = None, half: bool = False, value: str = "grid", scale: str = "bf16",
) -> Stored:  # fmt: skip
    lines = [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in (codes, scales, zeros, whole, table)]
    exponent, _, odd = FLOATS.get(value, (0, 0, 0))
    words = {"BITS": bits, "E": exponent, "ODD": odd, "HALF": int(half), "SCALE": scale, "PER": 8 // gcd(8, bits)}
    words |= {"VALUE": "float" if value in FLOATS else value, "BYTES": bits // gcd(8, bits)}
    return Stored(tuple(lines), m, min(group or m, m), words)  # type: ignore[arg-type]


def grouped_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Tensor:
    """The operator of this name: see `kernels.linear.grouped_linear`."""
    grid = linear.checked(codes, scales, zeros, bits, group, x.shape[-1], half)
    if x.dtype not in DTYPES or not x.numel() or not codes.numel():
        return linear.reference_linear(x, codes, scales, zeros, grid)
    return linear_of(x, _stored(x.shape[-1], bits, group, codes, scales, zeros, half=half))


def grouped_dense(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, m: int, half: bool = False) -> Tensor:
    """The operator of this name: see `kernels.linear.grouped_dense`."""
    grid = linear.checked(codes, scales, zeros, bits, group, m, half)
    if not codes.numel():
        return linear.reference_dense(codes, scales, zeros, grid, m)
    return dense_of(_stored(m, bits, group, codes, scales, zeros, half=half))


def lookup_linear(
    x: Tensor, codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, bits: int, name: Any, group: int, kind: Any
) -> Tensor:
    """The operator of this name: see `kernels.lookup.lookup_linear`."""
    levels = Levels(bits, name, group or None, kind)
    lookup._checked_with(x, codes, scales, whole, table, levels)
    if not x.numel() or not codes.numel():
        return lookup.reference_linear(x, codes, scales, whole, table, levels)
    return linear_of(x, _looked(x.shape[-1], levels, codes, scales, whole, table))


def lookup_dense(
    codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, bits: int, name: Any, group: int, kind: Any, m: int
) -> Tensor:
    """The operator of this name: see `kernels.lookup.lookup_dense`."""
    levels = Levels(bits, name, group or None, kind)
    lookup._checked(codes, scales, whole, table, levels, m)
    if not codes.numel():
        return lookup.reference_dense(codes, scales, whole, table, levels, m)
    return dense_of(_looked(m, levels, codes, scales, whole, table))


def _looked(m: int, levels: Levels, codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None) -> Stored:
    name = "table" if levels.table == "codebook" else levels.table
    return _stored(m, levels.bits, levels.group or 0, codes, scales, None, whole, table, value=name, scale=levels.scales)
