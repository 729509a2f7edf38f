"""Inside kernels: numbers of 8 and 16 bits as fp32, fp32 rounded to 16 bits, and products of two tiles.

Triton's interpreter cuts fp32 to bf16 where a GPU rounds to nearest, misreads bf16's subnormal numbers, and multiplies bf16 as the whole
numbers of their bits (3.7.1 and 3.9.0), so that there bf16 is converted by its bits and multiplied as fp32, which is exact."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _nothing():
    pass


INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.JITFunction))


def launched(x: Tensor) -> AbstractContextManager[object]:
    """Within, kernels are launched on the GPU that x is on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def wide(x):
    """x in fp32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        found = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        found = x.to(tl.float32)
    return found


@triton.jit
def rounded(x, kind: tl.constexpr):
    """x fp32 to the nearest of a kind, the even one of two."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        found = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        found = x.to(kind)
    return found


@triton.jit
def product(a, b, sums):
    """sums + a b in fp32, a and b of one dtype, products of fp32 as exact as fp32 is."""
    if INTERPRETED:
        sums = tl.dot(wide(a), wide(b), sums)
    else:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def small_float(code, BITS: tl.constexpr, E: tl.constexpr, ODD: tl.constexpr):
    """What codes of a float format stand for, fp32: a sign, E bits of an exponent, the rest a mantissa; the last ODD of a sign are NaN."""
    M: tl.constexpr = BITS - 1 - E
    BIAS: tl.constexpr = 2 ** (E - 1) - 1
    TINY: tl.constexpr = 2.0 ** (1 - BIAS - M)
    size = code & (2 ** (BITS - 1) - 1)
    exponent, mantissa = size >> M, size & (2**M - 1)
    value = (((exponent + (127 - BIAS)) << 23) | (mantissa << (23 - M))).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * TINY, value)
    if ODD > 0:
        value = tl.where(size >= 2 ** (BITS - 1) - ODD, float("nan"), value)
    return tl.where((code >> (BITS - 1)) != 0, -value, value)
