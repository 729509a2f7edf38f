"""Products with a matrix of codes that name values of a table, as it is stored: `lookup_linear`; `lookup_dense`: the matrix itself. Both in
torch.ops.laconic.

The native kernels look the values of 32 codes up at once, as bf16, and multiply them in fp32, or, with inputs in bf16 on processors that
have such an instruction, as pairs of bf16: products are exact either way, sums of fp32, and scales come in once a group. What is not finite
in x takes its way through the sums as it does in torch's product."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.bits import packed_width, unpack
from laconic.kernels.levels import Levels, decode, scales_of, values
from laconic.kernels.linear import by_panels, even, pairs, panels
from laconic.kernels.native import native
from laconic.kernels.picks import EVERY, rows_of

# more rows of bf16 than this are quicker over dense rows, made some at a time, by the kernel; rows of fp32 are more work
ROWS = {"plain": 4, "avx2": 4, "avx512": 256}
# of bf16 where torch multiplies pairs of them and these kernels do not
PAIRS = 80
FP32 = 4
# what the kernels know scales and tables by
SCALES = {"bf16": 0, "e8m0": 1, "e4m3": 2}
TABLES = {"codebook": 0, "e2m1": 1, "e1m2": 1, "e3m0": 1, "e2m3": 1, "e3m2": 1, "e4m3": 2, "e5m2": 3}

_OPS = torch.library.Library("laconic", "FRAGMENT")
_WORDS = "Tensor codes, Tensor scales, Tensor? whole, Tensor? table, int bits, str name, int group, str kind"
_OPS.define(f"lookup_linear(Tensor x, {_WORDS}) -> Tensor")
_OPS.define(f"lookup_dense({_WORDS}, int m) -> Tensor")


def lookup_linear(x: Tensor, codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels) -> Tensor:
    """x (..., m) fp32, bf16 or fp16, times the transposed matrix -> (..., n) in x's dtype.

    codes (n, ceil(m b / 8)) uint8, scales (n, g) bf16 or uint8, whole (1,) fp32 beside scales in e4m3, table (2^b,) bf16 of a codebook.
    ValueError for other shapes, TypeError for other dtypes."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
        # torch's dispatcher takes as long as a small product does
        return _linear(x, codes, scales, whole, table, levels)
    found: Tensor = torch.ops.laconic.lookup_linear(x, codes, scales, whole, table, *_words(levels))
    return found


def lookup_dense(codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels, m: int) -> Tensor:
    """The matrix itself, (n, m) fp32: table[code] * scale, the same numbers whatever computes them."""
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        return _dense(codes, scales, whole, table, levels, m)
    found: Tensor = torch.ops.laconic.lookup_dense(codes, scales, whole, table, *_words(levels), m)
    return found


def reference_linear(x: Tensor, codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels) -> Tensor:
    """lookup_linear by torch's own operations."""
    return F.linear(x, reference_dense(codes, scales, whole, table, levels, x.shape[-1]).to(x.dtype))


def reference_dense(codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels, m: int) -> Tensor:
    """lookup_dense by torch's own operations."""
    return decode(unpack(codes, levels.bits, m), scales_of(scales, levels, whole), levels, table)


def _words(levels: Levels) -> tuple[int, str, int, str]:
    return levels.bits, levels.table, levels.group or 0, levels.scales


@lru_cache(maxsize=256)
def _levels(bits: int, name: Literal["codebook"], group: int, kind: Literal["bf16"]) -> Levels:
    return Levels(bits, name, group or None, kind)


def _checked(codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels, m: int) -> None:
    n, bits, groups = codes.shape[0], levels.bits, levels.count(m)
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.uint8, (n, packed_width(m, bits))),
        ("scales", scales, torch.bfloat16 if levels.scales == "bf16" else torch.uint8, (n, groups)),
        ("whole", whole, torch.float32, (1,) if levels.scales == "e4m3" else None),
        ("table", table, torch.bfloat16, (2**bits,) if levels.table == "codebook" else None),
    ):
        if (tensor is None) != (shape is None):
            raise ValueError(f"{name} is {'missing' if tensor is None else 'given'}, which does not go with {levels}")
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} are {tensor.dtype}; they have to be {dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}; {n} rows of {m} codes of {bits} bits need {shape}")


def _checked_with(x: Tensor, codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels) -> None:
    _checked(codes, scales, whole, table, levels, x.shape[-1])
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}; it has to be torch.float32, torch.bfloat16 or torch.float16")


def _linear(x: Tensor, codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels) -> Tensor:
    m, n = x.shape[-1], codes.shape[0]
    _checked_with(x, codes, scales, whole, table, levels)
    there = native()
    rows = x.numel() // m if m else 0
    if there is None or not rows or not n:
        return reference_linear(x, codes, scales, whole, table, levels)
    known = even(levels.group or 0, m)
    shipped = _rows_for(there.level, x.dtype, known)
    if rows > (rows_of("lookup", levels.bits, x.dtype, n * m, shipped) if known else shipped):
        return by_panels(x, n, lambda part, room: _dense(codes[part], scales[part], whole, table, levels, m, room), there.level)
    given = (x if x.dtype != torch.float16 else x.float()).contiguous()
    out = torch.empty(*x.shape[:-1], n, dtype=given.dtype)
    kept = _kept(codes, scales, whole, table, levels)
    there.module.lookup_linear(
        given.data_ptr(),
        given.dtype == torch.bfloat16,
        rows,
        *_stored(kept, levels, n, m),
        out.data_ptr(),
        torch.get_num_threads(),
        there.level,
    )
    return out.to(x.dtype)


def _rows_for(level: str, dtype: torch.dtype, known: bool) -> int:
    """As `linear.rows_for`."""
    if dtype != torch.bfloat16:
        return ROWS[level] // FP32
    if pairs(level):
        return EVERY if known and panels(level) else min(ROWS[level], PAIRS)
    return ROWS[level]


def _dense(
    codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels, m: int, out: Tensor | None = None
) -> Tensor:
    _checked(codes, scales, whole, table, levels, m)
    there, n = native(), codes.shape[0]
    if there is None or not n or not m:
        return reference_dense(codes, scales, whole, table, levels, m)
    out = torch.empty(n, m, dtype=torch.float32) if out is None else out
    kept = _kept(codes, scales, whole, table, levels)
    there.module.lookup_dense(*_stored(kept, levels, n, m), out.data_ptr(), torch.get_num_threads(), there.level)
    return out


def _kept(codes: Tensor, scales: Tensor, whole: Tensor | None, table: Tensor | None, levels: Levels) -> list[Tensor]:
    """What the kernels read, in one piece each."""
    found = [codes.contiguous(), scales.contiguous(), (values(levels.table) if table is None else table).contiguous()]
    return found if whole is None else [*found, whole]


def _stored(kept: list[Tensor], levels: Levels, n: int, m: int) -> tuple[int, ...]:
    """Where it lies, and what it is; the caller keeps it."""
    codes, scales, table, *whole = kept
    return (
        codes.data_ptr(),
        codes.shape[1],
        scales.data_ptr(),
        SCALES[levels.scales],
        whole[0].data_ptr() if whole else 0,
        table.data_ptr(),
        TABLES[levels.table],
        n,
        m,
        levels.bits,
        levels.group or 0,
    )


def _known_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    table: Tensor | None,
    bits: int,
    name: Literal["codebook"],
    group: int,
    kind: Literal["bf16"],
) -> Tensor:
    return _linear(x, codes, scales, whole, table, _levels(bits, name, group, kind))


def _any_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    table: Tensor | None,
    bits: int,
    name: Literal["codebook"],
    group: int,
    kind: Literal["bf16"],
) -> Tensor:
    levels = _levels(bits, name, group, kind)
    _checked_with(x, codes, scales, whole, table, levels)
    return reference_linear(x, codes, scales, whole, table, levels)


def _known_dense(
    codes: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    table: Tensor | None,
    bits: int,
    name: Literal["codebook"],
    group: int,
    kind: Literal["bf16"],
    m: int,
) -> Tensor:
    levels = _levels(bits, name, group, kind)
    if codes.device.type == "cpu":
        return _dense(codes, scales, whole, table, levels, m)
    _checked(codes, scales, whole, table, levels, m)
    return reference_dense(codes, scales, whole, table, levels, m)


# where x is differentiated, and on other devices, products are made of torch's own operations
_OPS.impl("lookup_linear", _known_linear, "CPU")
_OPS.impl("lookup_linear", _any_linear, "CUDA")
_OPS.impl("lookup_linear", _any_linear, "AutogradCPU")
_OPS.impl("lookup_linear", _any_linear, "AutogradCUDA")
_OPS.impl("lookup_dense", _known_dense, "CPU")
_OPS.impl("lookup_dense", _known_dense, "CUDA")


@torch.library.register_fake("laconic::lookup_linear", lib=_OPS)
def _(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("laconic::lookup_dense", lib=_OPS)
def _(codes: Tensor, scales: Tensor, *words: int) -> Tensor:
    return codes.new_empty(codes.shape[0], words[-1], dtype=torch.float32)
