"""Products with matrices most of whose weights are zero, as they are stored: `sparse_linear`; `sparse_rows`: rows of the matrix, or all
of it. Both in torch.ops.laconic.

A bit says of each weight whether it is there; those that are there follow one another, as numbers or as grouped codes. "Load as sparse,
compute as dense" (Xia et al. 2023, arXiv:2309.10285, section 4): a word of the mask spreads the next weights over 32 columns in a register,
which are multiplied as if they had always been dense. So what is read is what is stored; a zero costs a multiplication and no bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.bits import packed_width, unpack
from laconic.kernels.grids import Grid
from laconic.kernels.linear import by_panels, checked, reference_dense
from laconic.kernels.native import native

# more rows of x than this are quicker by torch over dense rows, made some at a time; with AVX-512 none are
ROWS = {"plain": 8, "avx2": 8}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_OPS = torch.library.Library("laconic", "FRAGMENT")
_CODES = "Tensor? scales=None, Tensor? zeros=None, int bits=0, int group=0, bool half=False, int width=0"
_KEPT = f"Tensor mask, Tensor starts, Tensor kept, {_CODES}"
_OPS.define(f"sparse_linear(Tensor x, {_KEPT}) -> Tensor")
_OPS.define(f"sparse_rows(Tensor index, int m, {_KEPT}) -> Tensor")


class Codes(NamedTuple):
    """Weights that are there, on a grid: codes (rows, ceil(width b / 8)) uint8, scales (rows, g) bf16, zeros (rows, ceil(g z / 8)) uint8
    or None where symmetric. `rows` are those of the matrix, each with `width` weights, or one for all."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: Grid
    width: int


# the weights that are there, row after row: fp32, bf16 or fp16 of any shape, or codes
Kept = Tensor | Codes
_Words = tuple[Tensor, Tensor | None, Tensor | None, int, int, bool, int]


def row_starts(mask: Tensor, m: int) -> Tensor:
    """Where the weights of each row begin and the last end: mask (n, ceil(m / 8)) uint8 -> (n + 1,) int64. Worth keeping: `sparse_linear`
    counts them anew where it is not given them."""
    _checked_mask(mask, m)
    there, n = native(), mask.shape[0]
    if there is None or mask.device.type != "cpu":
        return F.pad(unpacked(mask, m).sum(1).cumsum(0), (1, 0))
    out, whole = torch.empty(n + 1, dtype=torch.int64), mask.contiguous()
    there.module.sparse_starts(whole.data_ptr(), whole.shape[1], n, m, out.data_ptr())
    return out


def sparse_linear(x: Tensor, mask: Tensor, kept: Kept, starts: Tensor | None = None) -> Tensor:
    """x (..., m) fp32, bf16 or fp16, times the transposed matrix -> (..., n) in x's dtype, added in fp32.

    mask (n, ceil(m / 8)) uint8, bit j of a row in byte j / 8 from the lowest up; starts: `row_starts(mask, m)`. ValueError for other shapes
    and where the mask has more or fewer weights than there are, TypeError for other dtypes. Where x is in bf16, weights that are not may be
    rounded to it, as torch would round them, and subnormal numbers may count as zero."""
    starts = row_starts(mask, x.shape[-1]) if starts is None else starts
    words = _words(kept)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
        return _linear(x, mask, starts, *words)
    found: Tensor = torch.ops.laconic.sparse_linear(x, mask, starts, *words)
    return found


def sparse_rows(mask: Tensor, kept: Kept, m: int, index: Tensor | slice = slice(None), starts: Tensor | None = None) -> Tensor:
    """Rows of the matrix, (len(index), m) fp32: the same numbers whatever computes them. IndexError for rows that are not there."""
    starts = row_starts(mask, m) if starts is None else starts
    chosen = torch.arange(mask.shape[0], device=mask.device)[index]
    given = chosen.reshape(-1), m, mask, starts, *_words(kept)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        found = _rows(*given)
    else:
        found = torch.ops.laconic.sparse_rows(*given)
    return found.reshape(*chosen.shape, m)


def sparse_pixels(x: Tensor, mask: Tensor, kept: Kept, starts: Tensor | None = None) -> Tensor:
    """A convolution of 1 x 1: x (b, m, ...) in channels, fp32, bf16 or fp16 -> (b, n, ...) in x's dtype, added in fp32.

    Elsen et al. 2020, arXiv:1911.09723, section 3.1: a strip of pixels of all channels stays in the nearest cache, the sums of an output's
    strip in registers, while its weights go by. ValueError and TypeError as `sparse_linear`."""
    _checked_x(x)
    (n, m), there = (mask.shape[0], x.shape[1]), native()
    starts = row_starts(mask, m) if starts is None else starts
    _checked_kept(mask, starts, kept, m)
    asks = x.requires_grad and torch.is_grad_enabled()
    if there is None or x.device.type != "cpu" or asks or torch.compiler.is_compiling() or not x.numel() or not n:
        return reference_sparse_pixels(x, mask, kept)
    given, out = x.float().contiguous(), torch.empty(x.shape[0], n, *x.shape[2:])
    (told, held), whole, places = _told(_kept(*_words(kept))), mask.contiguous(), starts.contiguous()
    if not there.module.sparse_pixels(
        given.data_ptr(), x.shape[0], given.numel() // (x.shape[0] * m), whole.data_ptr(), whole.shape[1], places.data_ptr(), n, m, told,
        out.data_ptr(), torch.get_num_threads(),
    ):  # fmt: skip
        raise _unlike(starts, kept)
    del held
    return out.to(x.dtype)


def reference_sparse_pixels(x: Tensor, mask: Tensor, kept: Kept) -> Tensor:
    """sparse_pixels by torch's own operations."""
    return reference_sparse_linear(x.movedim(1, -1), mask, kept).movedim(-1, 1)


def reference_sparse_linear(x: Tensor, mask: Tensor, kept: Kept, starts: Tensor | None = None) -> Tensor:
    """sparse_linear by torch's own operations, in fp32, of weights in bf16 where x is."""
    dense = reference_sparse_rows(mask, kept, x.shape[-1])
    if x.dtype == torch.bfloat16:
        dense = dense.bfloat16().float()
    return F.linear(x.float(), dense).to(x.dtype)


def reference_sparse_rows(mask: Tensor, kept: Kept, m: int, index: Tensor | slice = slice(None), starts: Tensor | None = None) -> Tensor:
    """sparse_rows by torch's own operations."""
    values = kept.float() if isinstance(kept, Tensor) else reference_dense(*kept)
    where = unpacked(mask, m)
    if (there := int(where.sum())) != values.numel():
        raise ValueError(f"{values.numel()} weights are held; the mask has {there}")
    return torch.zeros(where.shape, device=mask.device).masked_scatter(where, values.reshape(-1))[index]


def unpacked(mask: Tensor, m: int) -> Tensor:
    """(n, m) bool."""
    # the kernel makes its tensors where the mask is
    with mask.device:
        return unpack(mask, 1, m).bool()


def _words(kept: Kept) -> _Words:
    """As the operators take them."""
    if isinstance(kept, Tensor):
        return kept, None, None, 0, 0, False, 0
    codes, scales, zeros, grid, width = kept
    return codes, scales, zeros, grid.bits, grid.group or 0, grid.zeros == "half", width


def _kept(
    kept: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bits: int = 0,
    group: int = 0,
    half: bool = False,
    width: int = 0,
) -> Kept:
    if scales is None:
        if kept.dtype not in TYPES:
            raise TypeError(f"kept weights are {kept.dtype}; they have to be torch.float32, torch.bfloat16 or torch.float16")
        return kept
    return Codes(kept, scales, zeros, checked(kept, scales, zeros, bits, group, width, half), width)


def _checked_mask(mask: Tensor, m: int) -> None:
    if mask.dtype != torch.uint8:
        raise TypeError(f"mask is {mask.dtype}; it has to be torch.uint8")
    if mask.dim() != 2 or mask.shape[1] != packed_width(m, 1):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; rows of {m} bits need (n, {packed_width(m, 1)})")


def _checked_kept(mask: Tensor, starts: Tensor, kept: Kept, m: int) -> None:
    """What can be seen without reading."""
    _checked_mask(mask, m)
    n = mask.shape[0]
    if starts.dtype != torch.int64:
        raise TypeError(f"starts are {starts.dtype}; they have to be torch.int64")
    if starts.shape != (n + 1,):
        raise ValueError(f"starts have shape {tuple(starts.shape)}; {n} rows need {(n + 1,)}")
    if isinstance(kept, Codes) and kept.codes.shape[0] not in (1, n):
        raise ValueError(f"codes have {kept.codes.shape[0]} rows; a mask of {n} rows needs as many, or one for all")


def _checked_x(x: Tensor) -> None:
    if x.dtype not in TYPES:
        raise TypeError(f"x is {x.dtype}; it has to be torch.float32, torch.bfloat16 or torch.float16")


def _unlike(starts: Tensor, kept: Kept) -> ValueError:
    held = kept.numel() if isinstance(kept, Tensor) else kept.codes.shape[0] * kept.width
    return ValueError(f"{held} weights are held; starts are those of a mask that has {int(starts[-1])}, or of other rows")


def _told(kept: Kept) -> tuple[list[int], list[Tensor]]:
    """The weights as the native kernels read them, and what must not be freed while they do."""
    if isinstance(kept, Tensor):
        values = kept.contiguous()
        return [values.data_ptr(), TYPES[values.dtype], values.numel()], [values]
    whole = [t.contiguous() for t in (kept.codes, kept.scales, kept.zeros) if t is not None]
    codes, scales, *zeros = whole
    at = (zeros[0].data_ptr(), zeros[0].shape[1]) if zeros else (0, 0)
    grid = kept.grid
    shape = (codes.shape[0], kept.width, grid.bits, grid.group or 0, int(grid.zeros == "half"))
    return [codes.data_ptr(), codes.shape[1], scales.data_ptr(), *at, *shape], whole


def _linear(x: Tensor, mask: Tensor, starts: Tensor, *words: Any) -> Tensor:
    kept = _kept(*words)
    _checked_x(x)
    (n, m), there = (mask.shape[0], x.shape[-1]), native()
    _checked_kept(mask, starts, kept, m)
    rows = x.numel() // m if m else 0
    if there is None or not rows or not n:
        return _any_linear(x, mask, starts, *words)
    if rows > ROWS.get(there.level, rows):

        def some(part: slice, room: Tensor) -> Tensor:
            return _native_rows(None, part.start, part.stop - part.start, m, mask, kept, starts)

        return by_panels(x, n, some, there.level)
    given = (x if x.dtype != torch.float16 else x.float()).contiguous()
    out = torch.empty(*x.shape[:-1], n, dtype=given.dtype)
    (told, held), whole, places = _told(kept), mask.contiguous(), starts.contiguous()
    low = given.dtype == torch.bfloat16
    if not there.module.sparse_linear(
        given.data_ptr(),
        low,
        rows,
        whole.data_ptr(),
        whole.shape[1],
        places.data_ptr(),
        n,
        m,
        told,
        out.data_ptr(),
        low,
        torch.get_num_threads(),
        there.level,
    ):
        raise _unlike(starts, kept)
    del held
    return out.to(x.dtype)


def _rows(index: Tensor, m: int, mask: Tensor, starts: Tensor, *words: Any) -> Tensor:
    kept, there = _kept(*words), native()
    _checked_kept(mask, starts, kept, m)
    if there is None or not index.numel() or not m:
        return _any_rows(index, m, mask, starts, *words)
    if index.dtype != torch.int64 or index.dim() != 1 or int(index.min()) < 0 or int(index.max()) >= mask.shape[0]:
        raise ValueError(f"index is {index.dtype} of shape {tuple(index.shape)}; it has to list rows from 0 to {mask.shape[0] - 1}")
    return _native_rows(index.contiguous(), 0, index.numel(), m, mask, kept, starts)


def _native_rows(index: Tensor | None, first: int, count: int, m: int, mask: Tensor, kept: Kept, starts: Tensor) -> Tensor:
    """Rows `index`, or `count` rows from the first on."""
    there = native()
    if there is None:
        raise RuntimeError("there are no native kernels")
    out = torch.empty(count, m)
    (told, held), whole, places = _told(kept), mask.contiguous(), starts.contiguous()
    if not there.module.sparse_rows(
        whole.data_ptr(),
        whole.shape[1],
        places.data_ptr(),
        whole.shape[0],
        m,
        told,
        0 if index is None else index.data_ptr(),
        first,
        count,
        out.data_ptr(),
        torch.get_num_threads(),
        there.level,
    ):
        raise _unlike(starts, kept)
    del held
    return out


def _any_linear(x: Tensor, mask: Tensor, starts: Tensor, *words: Any) -> Tensor:
    kept = _kept(*words)
    _checked_x(x)
    _checked_kept(mask, starts, kept, x.shape[-1])
    return reference_sparse_linear(x, mask, kept)


def _any_rows(index: Tensor, m: int, mask: Tensor, starts: Tensor, *words: Any) -> Tensor:
    kept = _kept(*words)
    _checked_kept(mask, starts, kept, m)
    return reference_sparse_rows(mask, kept, m, index)


# where x is differentiated, and on other devices, products are made of torch's own operations
_OPS.impl("sparse_linear", _linear, "CPU")
_OPS.impl("sparse_linear", _any_linear, "CUDA")
_OPS.impl("sparse_linear", _any_linear, "AutogradCPU")
_OPS.impl("sparse_linear", _any_linear, "AutogradCUDA")
_OPS.impl("sparse_rows", _rows, "CPU")
_OPS.impl("sparse_rows", _any_rows, "CUDA")


@torch.library.register_fake("laconic::sparse_linear", lib=_OPS)
def _(x: Tensor, mask: Tensor, starts: Tensor, *words: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


@torch.library.register_fake("laconic::sparse_rows", lib=_OPS)
def _(index: Tensor, m: int, mask: Tensor, starts: Tensor, *words: Any) -> Tensor:
    return index.new_empty(index.shape[0], m, dtype=torch.float32)
