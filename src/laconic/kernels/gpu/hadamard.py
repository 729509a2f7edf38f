"""`kernels.hadamard` on a GPU: the part of the transform that is Sylvester's, in fp32 within a program's registers; the small factor of
widths that are no power of two is one product more. bf16 and fp16 are rounded once, at the end, where the reference rounds at each step."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from laconic.kernels import hadamard as reference
from laconic.kernels.gpu.linear import DTYPES
from laconic.kernels.gpu.numbers import launched, rounded, wide

# the widest part that registers hold
WIDEST = 16384


@triton.jit
def _sylvester(x, s_line, s_part, s_place, parts, lines, by, out, LINES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """LINES lines of WIDTH = 2^STEPS entries, out (lines, WIDTH) in its dtype; `parts` lines make a row of x."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    place = tl.arange(0, WIDTH)
    seen = (line < lines)[:, None] & (place < WIDTH)[None, :]
    line = line.to(tl.int64)
    at = (line // parts) * s_line + (line % parts) * s_part
    found = wide(tl.load(x + at[:, None] + place[None, :] * s_place, mask=seen, other=0))
    for i in tl.static_range(STEPS):
        pairs = tl.permute(tl.reshape(found, (LINES, WIDTH // (2 * 2**i), 2, 2**i)), (0, 1, 3, 2))
        a, b = tl.split(pairs)
        found = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (LINES, WIDTH))
    tl.store(out + line[:, None] * WIDTH + place[None, :], rounded(found / by, out.dtype.element_ty), mask=seen)


def _along(x: Tensor, base: Tensor) -> Tensor:
    n, b = x.shape[-1], base.shape[0]
    width, flat = n // b, x.reshape(-1, n)
    lines = flat.shape[0] * b
    spread = x.new_empty(lines, width, dtype=x.dtype if b == 1 else base.dtype)
    some = max(1, min(16, 2048 // width))
    with launched(x):
        _sylvester[(triton.cdiv(lines, some),)](
            flat, flat.stride(0), flat.stride(1) * width, flat.stride(1), b, lines, math.sqrt(width), spread,
            LINES=some, WIDTH=width, STEPS=width.bit_length() - 1, num_warps=8 if width > 4096 else 4,
        )  # fmt: skip
    if b > 1:
        spread = (base.T @ spread.unflatten(0, (-1, b))).to(x.dtype)
    return spread.reshape(x.shape)


def _known(x: Tensor, base: Tensor) -> bool:
    return (
        x.dtype in DTYPES and x.numel() > 0 and x.shape[-1] // base.shape[0] <= WIDEST and not (x.requires_grad and torch.is_grad_enabled())
    )


def hadamard(x: Tensor) -> Tensor:
    """x (..., n) -> x H, the same shape and length: see `kernels.hadamard.hadamard`, which serves fp64 and gradients."""
    base = reference._base(x.shape[-1]).to(x.device)
    return _along(x, base.float()) if _known(x, base) else reference.reference_hadamard(x)


def unhadamard(x: Tensor) -> Tensor:
    """x (..., n) -> x H^T, which undoes `hadamard`."""
    base = reference._base(x.shape[-1]).to(x.device)
    return _along(x, base.T.float()) if _known(x, base) else reference.reference_unhadamard(x)
