"""Products with a matrix of grouped codes as it is stored: `grouped_linear`, and `grouped_linear_int8`, where inputs are rounded to 8 bits
as they come; `grouped_dense`: the matrix itself. All in torch.ops.laconic.

The native kernels multiply codes with integers: an entry of x in fp32 becomes two of 16 bits, in steps of the greatest of its run of 16
to 256 columns, and loses nothing that a sum in fp32 would keep; one in bf16 becomes one, wrong by at most 2^-16 of the greatest. Runs are
added in fp32. Many rows of bf16 are multiplied with the matrix rounded to bf16, as the reference does it: where the processor multiplies
pairs of bf16 by a kernel that makes some rows of the matrix dense at a time, for as long as all rows of x need them, else by torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.bits import packed_width, unpack
from laconic.kernels.grids import Grid, decode, through
from laconic.kernels.native import native
from laconic.kernels.picks import EVERY, rows_of

# more rows of bf16 than this are quicker over dense rows, made PANEL weights at a time: by the kernel, and by bits where it has a quicker
# way; rows of fp32 are more work
ROWS: dict[str, dict[int, int]] = {"plain": {}, "avx2": {}, "avx512": {2: 256, 4: 192}}
OTHER = {"plain": 4, "avx2": 16, "avx512": 96}
# of bf16 where torch multiplies pairs of them (AMX) and these kernels do not, or do not for such groups
PAIRS, OTHER_PAIRS = {2: 80, 4: 80}, 40
FP32 = 4
PANEL = 1 << 20
# columns of x that share a scale where x has 8 bits: a group, or so many of one that is longer
RUN = 128

_OPS = torch.library.Library("laconic", "DEF")
_OPS.define("grouped_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, bool half=False) -> Tensor")
_OPS.define("grouped_linear_int8(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, bool half=False) -> Tensor")
_OPS.define("grouped_dense(Tensor codes, Tensor scales, Tensor? zeros, int bits, int group, int m, bool half=False) -> Tensor")


def grouped_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """x (..., m) fp32, bf16 or fp16, times the transposed matrix -> (..., n) in x's dtype.

    codes (n, ceil(m b / 8)) uint8, scales (n, g) bf16, zeros (n, ceil(g b / 8)) uint8 or None where symmetric. ValueError for other shapes,
    TypeError for other dtypes."""
    words = grid.bits, grid.group or 0, grid.zeros == "half"
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
        # torch's dispatcher takes as long as a small product does
        return _linear(x, codes, scales, zeros, *words)
    found: Tensor = torch.ops.laconic.grouped_linear(x, codes, scales, zeros, *words)
    return found


def grouped_linear_int8(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """grouped_linear with x rounded to whole numbers of -127 to 127 as it comes, one scale for each run of a row's columns: a group, or 128
    columns of one that is longer. Sums of a run are exact in whole numbers and are added in fp32. A row with NaN or an infinity is not
    rounded; the gradient passes as if none was."""
    words = grid.bits, grid.group or 0, grid.zeros == "half"
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
        return _linear_int8(x, codes, scales, zeros, *words)
    found: Tensor = torch.ops.laconic.grouped_linear_int8(x, codes, scales, zeros, *words)
    return found


def grouped_dense(codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, m: int) -> Tensor:
    """The matrix itself, (n, m) fp32: (code - zero) * scale, the same numbers whatever computes them."""
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        return _dense(codes, scales, zeros, grid.bits, grid.group or 0, m, grid.zeros == "half")
    found: Tensor = torch.ops.laconic.grouped_dense(codes, scales, zeros, grid.bits, grid.group or 0, m, grid.zeros == "half")
    return found


def reference_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """grouped_linear by torch's own operations."""
    return F.linear(x, reference_dense(codes, scales, zeros, grid, x.shape[-1]).to(x.dtype))


def reference_dense(codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, m: int) -> Tensor:
    """grouped_dense by torch's own operations."""
    scale = scales.float()
    return decode(unpack(codes, grid.bits, m), scale, zeros_of(zeros, scale, grid), grid)


def zeros_of(zeros: Tensor | None, scale: Tensor, grid: Grid) -> Tensor:
    """Zeros as numbers (n, g) fp32 from stored ones (None: symmetric), for scales (n, g)."""
    if zeros is None:
        return torch.full_like(scale, grid.middle)
    return unpack(zeros, grid.zero_bits, scale.shape[1]).float() / grid.zero_steps


def reference_linear_int8(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """grouped_linear_int8 by torch's own operations, a run at a time: whole numbers below 2^24, so their sums in fp32 are exact."""
    m, wide = x.shape[-1], x.float()
    whole = reference_dense(codes, torch.ones_like(scales), zeros, grid, m)
    most = wide.new_tensor(127.0)
    out = wide.new_zeros(*x.shape[:-1], codes.shape[0])
    width = grid.width(m) if m else 1
    for g, start in enumerate(range(0, m, width)):
        end = min(start + width, m)
        for begin in range(start, end, RUN):
            part = slice(begin, min(begin + RUN, end))
            peak = wide[..., part].abs().amax(-1, keepdim=True)
            some = peak >= 1e-33
            # by tensors: torch turns a division of or by a plain number into other operations, which round otherwise
            near = (wide[..., part] * torch.where(some, most / peak, 0.0)).round()
            scale = torch.where(some, peak / most, 0.0) * scales[:, g].float()
            out = out + F.linear(near, whole[:, part]) * scale
    finite = torch.isfinite(wide).all(-1, keepdim=True)
    if not bool(finite.all()):
        out = torch.where(finite, out, reference_linear(wide, codes, scales, zeros, grid))
    return out.to(x.dtype)


def rows_for(level: str, bits: int, dtype: torch.dtype, known: bool = True, weights: int = 0) -> int:
    """Rows of x up to which a product with a matrix of so many weights is quicker by the kernels than by torch over dense rows. known:
    `even` says so of its groups."""
    shipped = _shipped(level, bits, dtype, known)
    return rows_of("grouped", bits, dtype, weights, shipped) if known else shipped


def _shipped(level: str, bits: int, dtype: torch.dtype, known: bool) -> int:
    """What was found on other processors of the level."""
    most = ROWS[level].get(bits, OTHER[level])
    if dtype == torch.bfloat16 and pairs(level):
        if known and panels(level):
            return EVERY
        return min(most, PAIRS.get(bits, OTHER_PAIRS))
    return most if dtype == torch.bfloat16 else most // FP32


@lru_cache(maxsize=1024)
def _grid(bits: int, group: int, m: int, half: bool = False) -> tuple[Grid, int]:
    """The grid and how many groups a row of m has."""
    grid = Grid(bits, group or None, zeros="half" if half else "whole")
    return grid, grid.count(m) if m else 0


def checked(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, m: int, half: bool = False) -> Grid:
    grid, groups = _grid(bits, group, m, half)
    n = codes.shape[0]
    for name, tensor, dtype, width in (
        ("codes", codes, torch.uint8, packed_width(m, bits)),
        ("scales", scales, torch.bfloat16, groups),
        ("zeros", zeros, torch.uint8, packed_width(groups, grid.zero_bits)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} are {tensor.dtype}; they have to be {dtype}")
        if tensor.shape != (n, width):
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}; {n} rows of {m} codes of {bits} bits need {(n, width)}")
    return grid


def _checked_with(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Grid:
    grid = checked(codes, scales, zeros, bits, group, x.shape[-1], half)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}; it has to be torch.float32, torch.bfloat16 or torch.float16")
    return grid


def _linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Tensor:
    m, n = x.shape[-1], codes.shape[0]
    grid = _checked_with(x, codes, scales, zeros, bits, group, half)
    there = native()
    rows = x.numel() // m if m else 0
    if there is None or not rows or not n:
        return reference_linear(x, codes, scales, zeros, grid)
    if rows > rows_for(there.level, bits, x.dtype, even(group, m), n * m):

        def some(rows: slice, room: Tensor) -> Tensor:
            kept = codes[rows], scales[rows], None if zeros is None else zeros[rows]
            return _dense(*kept, bits, group, m, half, room)

        return by_panels(x, n, some, there.level)
    given = (x if x.dtype != torch.float16 else x.float()).contiguous()
    out = torch.empty(*x.shape[:-1], n, dtype=given.dtype)
    kept = [t.contiguous() for t in (codes, scales, zeros) if t is not None]
    if not there.module.linear(
        given.data_ptr(),
        given.dtype == torch.bfloat16,
        rows,
        *_stored(kept),
        n,
        m,
        bits,
        group,
        half,
        out.data_ptr(),
        _threads(),
        there.level,
    ):
        # NaN and infinities go the reference's way
        return reference_linear(x, codes, scales, zeros, grid)
    return out.to(x.dtype)


def _linear_int8(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Tensor:
    m, n = x.shape[-1], codes.shape[0]
    grid = _checked_with(x, codes, scales, zeros, bits, group, half)
    there = native()
    rows = x.numel() // m if m else 0
    if there is None or not rows or not n:
        return reference_linear_int8(x, codes, scales, zeros, grid)
    given = (x if x.dtype != torch.float16 else x.float()).contiguous()
    out = torch.empty(*x.shape[:-1], n, dtype=given.dtype)
    kept = [t.contiguous() for t in (codes, scales, zeros) if t is not None]
    if not there.module.linear_int8(
        given.data_ptr(),
        given.dtype == torch.bfloat16,
        rows,
        *_stored(kept),
        n,
        m,
        bits,
        group,
        half,
        out.data_ptr(),
        _threads(),
        there.level,
    ):
        # NaN and infinities go the reference's way
        return reference_linear_int8(x, codes, scales, zeros, grid)
    return out.to(x.dtype)


def by_panels(x: Tensor, n: int, some: Callable[[slice, Tensor], Tensor], level: str, unit: int = 1) -> Tensor:
    """x (..., m) times the transpose of a matrix of n rows, of which `some` makes a slice dense, in the room (rows, m) fp32 that it gets:
    some at a time, from a multiple of `unit` on, in bf16 where x is and the processor multiplies that."""
    m = x.shape[-1]
    flat = x.reshape(-1, m)
    narrow = x.dtype == torch.bfloat16 and pairs(level)
    flat, out = (flat, flat.new_empty(n, flat.shape[0])) if narrow else (flat.float(), torch.empty(n, flat.shape[0]))
    step = min(n, max(1, PANEL // m // unit) * unit)
    room = torch.empty(step, m)
    rounded = torch.empty(step, m, dtype=torch.bfloat16) if narrow else room
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        panel = some(rows, room[: rows.stop - i])
        torch.mm(rounded[: rows.stop - i].copy_(panel) if narrow else panel, flat.T, out=out[rows])
    return out.T.reshape(*x.shape[:-1], n).to(x.dtype)


@lru_cache(maxsize=8)
def pairs(level: str) -> bool:
    """Whether this processor multiplies pairs of bf16 (AVX-512 BF16, AMX), so that torch's products of them are the quicker ones."""
    return level == "avx512" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@lru_cache(maxsize=8)
def panels(level: str) -> bool:
    """Whether the kernels multiply pairs of bf16 at this level, and as quickly as torch does; with AMX torch is quicker."""
    there = native()
    return there is not None and level == "avx512" and bool(there.module.only_pairs())


def even(group: int, m: int) -> bool:
    """Whether the kernels' panels know such groups of a row of m (0: the whole row)."""
    return group == 0 or group >= m or group % 16 == 0


def _dense(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    m: int,
    half: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    grid = checked(codes, scales, zeros, bits, group, m, half)
    there, n = native(), codes.shape[0]
    if there is None or not n or not m:
        return reference_dense(codes, scales, zeros, grid, m)
    out = torch.empty(n, m, dtype=torch.float32) if out is None else out
    kept = [t.contiguous() for t in (codes, scales, zeros) if t is not None]
    there.module.dense(*_stored(kept), n, m, bits, group, half, out.data_ptr(), _threads(), there.level)
    return out


def _stored(kept: list[Tensor]) -> tuple[int, int, int, int, int]:
    """Where codes, scales and zeros lie, with the bytes of a row; the caller keeps them."""
    codes, scales, *zeros = kept
    return codes.data_ptr(), codes.shape[1], scales.data_ptr(), *((zeros[0].data_ptr(), zeros[0].shape[1]) if zeros else (0, 0))


def _threads() -> int:
    return torch.get_num_threads()


def _any_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Tensor:
    return reference_linear(x, codes, scales, zeros, checked(codes, scales, zeros, bits, group, x.shape[-1], half))


def _any_linear_int8(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Tensor:
    grid = _checked_with(x, codes, scales, zeros, bits, group, half)
    found = reference_linear_int8(x.detach(), codes, scales, zeros, grid)
    return through(reference_linear(x, codes, scales, zeros, grid), found) if x.requires_grad else found


def _any_dense(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, m: int, half: bool = False) -> Tensor:
    return reference_dense(codes, scales, zeros, checked(codes, scales, zeros, bits, group, m, half), m)


# where x is differentiated, and on other devices, products are made of torch's own operations
_OPS.impl("grouped_linear", _linear, "CPU")
_OPS.impl("grouped_linear", _any_linear, "CUDA")
_OPS.impl("grouped_linear", _any_linear, "AutogradCPU")
_OPS.impl("grouped_linear", _any_linear, "AutogradCUDA")
_OPS.impl("grouped_linear_int8", _linear_int8, "CPU")
_OPS.impl("grouped_linear_int8", _any_linear_int8, "CUDA")
_OPS.impl("grouped_linear_int8", _any_linear_int8, "AutogradCPU")
_OPS.impl("grouped_linear_int8", _any_linear_int8, "AutogradCUDA")
_OPS.impl("grouped_dense", _dense, "CPU")
_OPS.impl("grouped_dense", _any_dense, "CUDA")


@torch.library.register_fake("laconic::grouped_linear", lib=_OPS)
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("laconic::grouped_linear_int8", lib=_OPS)
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, half: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.register_fake("laconic::grouped_dense", lib=_OPS)
def _(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, m: int, half: bool = False) -> Tensor:
    return codes.new_empty(codes.shape[0], m, dtype=torch.float32)
