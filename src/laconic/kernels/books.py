"""Products with matrices of vectors that indices name (`kernels.vectors`), as they are stored: `book_linear`; the matrix itself:
`book_dense`. Both in torch.ops.laconic.

The native kernels read the indices of a run of rows once; each column then adds x times its entry to the sums of the run, in fp32. Many
rows of bf16 are multiplied with the matrix rounded to bf16: vectors of 4 and 8 by panels where the processor multiplies pairs of bf16,
others by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.bits import packed_width, unpack
from laconic.kernels.linear import by_panels, panels
from laconic.kernels.native import native
from laconic.kernels.vectors import Vectors, laid, looked_up

# more rows than this are quicker over dense rows, made some at a time; where the kernels make panels, of vectors of these widths, more than
# FEW, which is for entries of 8 numbers in one table
ROWS, FEW = 8, 4
WIDTHS = (4, 8)

_OPS = torch.library.Library("laconic", "FRAGMENT")
_WORDS = "Tensor[] codes, Tensor[] tables, Tensor? scales, int n, int width, int index, int residual"
_OPS.define(f"book_linear(Tensor x, {_WORDS}) -> Tensor")
_OPS.define(f"book_dense({_WORDS}, int m) -> Tensor")


def book_linear(x: Tensor, codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, vectors: Vectors, n: int) -> Tensor:
    """x (..., m) fp32, bf16 or fp16, times the transposed matrix -> (..., n) in x's dtype.

    For each table codes (ceil(n / width), ceil(m b / 8)) uint8 and (2^b, width) bf16; scales (n,) bf16 or None. ValueError for other
    shapes, TypeError for other dtypes."""
    words = n, vectors.width, vectors.index, vectors.residual
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
        return _linear(x, codes, tables, scales, *words)
    found: Tensor = torch.ops.laconic.book_linear(x, list(codes), list(tables), scales, *words)
    return found


def book_dense(codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, vectors: Vectors, n: int, m: int) -> Tensor:
    """The matrix itself, (n, m) fp32: the same numbers whatever computes them."""
    words = n, vectors.width, vectors.index, vectors.residual
    if all(code.device.type == "cpu" for code in codes) and not torch.compiler.is_compiling():
        return _dense(codes, tables, scales, *words, m)
    found: Tensor = torch.ops.laconic.book_dense(list(codes), list(tables), scales, *words, m)
    return found


def reference_book_linear(
    x: Tensor, codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, vectors: Vectors, n: int
) -> Tensor:
    """book_linear by torch's own operations."""
    return F.linear(x, reference_book_dense(codes, tables, scales, vectors, n, x.shape[-1]).to(x.dtype))


def reference_book_dense(
    codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, vectors: Vectors, n: int, m: int
) -> Tensor:
    """book_dense by torch's own operations."""
    plain = [unpack(code, bits, m) for code, bits in zip(codes, vectors.bits, strict=True)]
    dense = laid(looked_up(plain, tables), n)
    return dense if scales is None else dense * scales.float()[:, None]


def _checked(codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, vectors: Vectors, n: int, m: int) -> None:
    if len(codes) != len(vectors.bits) or len(tables) != len(vectors.bits):
        raise ValueError(f"there are {len(codes)} codes and {len(tables)} tables; {vectors} has {len(vectors.bits)}")
    wanted: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = []
    for code, table, bits in zip(codes, tables, vectors.bits, strict=True):
        wanted.append(("codes", code, torch.uint8, (vectors.runs(n), packed_width(m, bits))))
        wanted.append(("tables", table, torch.bfloat16, (2**bits, vectors.width)))
    if scales is not None:
        wanted.append(("scales", scales, torch.bfloat16, (n,)))
    for name, tensor, dtype, shape in wanted:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} are {tensor.dtype}; they have to be {dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}; {n} rows of {m} weights in {vectors} need {shape}")


def _linear(
    x: Tensor, codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, n: int, width: int, index: int, residual: int
) -> Tensor:
    m, vectors = x.shape[-1], Vectors(width, index, residual, scales is not None)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}; it has to be torch.float32, torch.bfloat16 or torch.float16")
    _checked(codes, tables, scales, vectors, n, m)
    there = native()
    rows = x.numel() // m if m else 0
    if there is None or not rows or not n:
        return reference_book_linear(x, codes, tables, scales, vectors, n)
    passing = rows > FEW * width // (8 * len(tables)) and x.dtype == torch.bfloat16 and width in WIDTHS and panels(there.level)
    if rows > ROWS and not passing:

        def some(rows: slice, room: Tensor) -> Tensor:
            return _dense(*_runs(codes, tables, scales, rows, width), rows.stop - rows.start, width, index, residual, m, room)

        return by_panels(x, n, some, there.level, width)
    given = (x if x.dtype != torch.float16 else x.float()).contiguous()
    out = torch.empty(*x.shape[:-1], n, dtype=given.dtype)
    told, kept = _told(codes, tables, scales, vectors)
    at = kept[-1].data_ptr() if scales is not None else 0
    there.module.vector_linear(
        given.data_ptr(),
        given.dtype == torch.bfloat16,
        rows,
        told,
        at,
        n,
        m,
        width,
        out.data_ptr(),
        passing,
        torch.get_num_threads(),
        there.level,
    )
    del kept
    return out.to(x.dtype)


def _runs(
    codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, rows: slice, width: int
) -> tuple[list[Tensor], Sequence[Tensor], Tensor | None]:
    """What some rows are made of, the first of which begins a run."""
    runs = slice(rows.start // width, -(-rows.stop // width))
    return [code[runs] for code in codes], tables, None if scales is None else scales[rows]


def _dense(
    codes: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Tensor | None,
    n: int,
    width: int,
    index: int,
    residual: int,
    m: int,
    out: Tensor | None = None,
) -> Tensor:
    vectors = Vectors(width, index, residual, scales is not None)
    _checked(codes, tables, scales, vectors, n, m)
    there = native()
    if there is None or not n or not m:
        return reference_book_dense(codes, tables, scales, vectors, n, m)
    out = torch.empty(n, m) if out is None else out
    told, kept = _told(codes, tables, scales, vectors)
    at = kept[-1].data_ptr() if scales is not None else 0
    there.module.vector_dense(told, at, n, m, width, out.data_ptr(), torch.get_num_threads())
    del kept
    return out


def _told(codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, vectors: Vectors) -> tuple[list[int], list[Tensor]]:
    """Books as the native kernels read them, and what must not be freed while they do, scales last."""
    told, kept = [], []
    for code, table, bits in zip(codes, tables, vectors.bits, strict=True):
        whole, entries = code.contiguous(), table.contiguous()
        told += [whole.data_ptr(), whole.shape[1], bits, entries.data_ptr()]
        kept += [whole, entries]
    return told, kept if scales is None else [*kept, scales.contiguous()]


def _any_linear(
    x: Tensor, codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, n: int, width: int, index: int, residual: int
) -> Tensor:
    return reference_book_linear(x, codes, tables, scales, Vectors(width, index, residual, scales is not None), n)


def _any_dense(
    codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, n: int, width: int, index: int, residual: int, m: int
) -> Tensor:
    return reference_book_dense(codes, tables, scales, Vectors(width, index, residual, scales is not None), n, m)


# where x is differentiated, and on other devices, products are made of torch's own operations
_OPS.impl("book_linear", _linear, "CPU")
_OPS.impl("book_linear", _any_linear, "CUDA")
_OPS.impl("book_linear", _any_linear, "AutogradCPU")
_OPS.impl("book_linear", _any_linear, "AutogradCUDA")
_OPS.impl("book_dense", _dense, "CPU")
_OPS.impl("book_dense", _any_dense, "CUDA")


@torch.library.register_fake("laconic::book_linear", lib=_OPS)
def _(x: Tensor, codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, n: int, *_: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@torch.library.register_fake("laconic::book_dense", lib=_OPS)
def _(codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Tensor | None, n: int, *words: int) -> Tensor:
    return codes[0].new_empty(n, words[-1], dtype=torch.float32)
