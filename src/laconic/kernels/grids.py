"""Grouped integer grids: w is about (code - zero) * scale, codes of b bits, one scale (and zero) for each group of a row.

Widths that the group does not divide end in a shorter last group; a group of None is the whole row. Scales have values of bf16, or are
powers of 2^(1/32), of which one matrix can store any 256 in a row, 8 octaves, in a byte each (scales quantized in their turn: Dettmers et
al. 2023, QLoRA, arXiv:2305.14314, section 3), or numbers of e4m3 times one power of two of the matrix's own, without which small ones would
underflow (Baek et al. 2025, FireQ, arXiv:2505.20839)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.native import native

# scales of 8 bits: steps of an octave, and how many of them a matrix can store
NOTCHES, SPAN = 32, 256
# scales in e4m3: bits of the mantissa, the least exponent of a normal number, and the greatest scale, eight times which is e4m3's greatest
# number: what a code of 4 bits makes of a scale is one of e4m3's range too
MANTISSA, LEAST, MOST = 3, -6, 56.0
# 2^(i/32) as bf16 knows it
_OCTAVE = torch.tensor([2 ** (i / NOTCHES) for i in range(NOTCHES)], dtype=torch.float64).to(torch.bfloat16).float()


@dataclass(frozen=True)
class Grid:
    """bits 1 to 8; group = weights of a row that share a scale (None: the whole row); symmetric: zero fixed at 2^(bits-1); scales: as they
    are stored, in 16 bits or in 8; zeros: whole numbers, or also half-way between two codes, and if symmetric always there, so that as
    many codes are above zero as below: what few bits want."""

    bits: int
    group: int | None = 64
    symmetric: bool = False
    scales: Literal["bf16", "log8", "e4m3"] = "bf16"
    zeros: Literal["whole", "half"] = "whole"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: a grid has 1 to 8 bits")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: a group has at least one weight; leave it out for whole rows")
        if self.scales not in ("bf16", "log8", "e4m3"):
            raise ValueError(f"scales={self.scales}: scales are stored as bf16, as log8 or as e4m3")
        if self.zeros not in ("whole", "half"):
            raise ValueError(f"zeros={self.zeros}: zeros are whole or half numbers")
        if self.zeros == "half" and self.bits == 8:
            raise ValueError("zeros=half: codes of 8 bits are fine enough without; leave it out")

    @property
    def middle(self) -> float:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1) - (0.5 if self.zeros == "half" else 0.0)

    @property
    def zero_steps(self) -> int:
        """Steps of a stored zero in one code."""
        return 2 if self.zeros == "half" else 1

    @property
    def zero_bits(self) -> int:
        """Bits of a stored zero."""
        return 0 if self.symmetric else self.bits + (self.zeros == "half")

    @property
    def row(self) -> Grid:
        """The same with one group a row."""
        return replace(self, group=None)

    def width(self, m: int) -> int:
        """Weights in a full group of a row of m."""
        return m if self.group is None else min(self.group, m)

    def count(self, m: int) -> int:
        """Groups in a row of m, the ragged last one included."""
        return -(-m // self.width(m))

    def index(self, m: int) -> Tensor:
        """(m,) the group of each column."""
        return torch.arange(m) // self.width(m)


class Groups(Protocol):
    """What says how a row of m weights falls into groups, the last of which may be shorter."""

    def width(self, m: int) -> int:
        """Weights in a full group."""

    def count(self, m: int) -> int:
        """Groups in a row."""


def grouped(x: Tensor, grid: Groups, fill: float = 0.0) -> Tensor:
    """(n, m) -> (n, groups, width), the ragged end filled."""
    n, m = x.shape
    width, count = grid.width(m), grid.count(m)
    if width * count != m:
        x = F.pad(x, (0, width * count - m), value=fill)
    return x.reshape(n, count, width)


def ungrouped(runs: Tensor, m: int) -> Tensor:
    """(n, groups, width) -> (n, m), without what filled the ragged end."""
    return runs.reshape(runs.shape[0], -1)[:, :m]


def _ends(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of each group, zero always inside."""
    runs = grouped(weight, grid)
    return runs.amin(-1).clamp(max=0.0), runs.amax(-1).clamp(min=0.0)


def notches(scale: Tensor) -> Tensor:
    """The nearest powers of 2^(1/32) as whole numbers, int32; the finest for zeros."""
    return (scale.float().clamp(min=2.0**-126).log2() * NOTCHES).round().to(torch.int32)


def notched(number: Tensor) -> Tensor:
    """The scales that such numbers stand for, fp32 with bf16 values, the same on every processor."""
    octave = number.div(NOTCHES, rounding_mode="floor").clamp(-126, 127).to(torch.int32)
    # a power of two is its exponent's bits
    return _OCTAVE.to(number.device)[(number % NOTCHES).long()] * (octave + 127).bitwise_left_shift(23).view(torch.float32)


def octave_of(greatest: Tensor) -> Tensor:
    """Of a matrix's greatest scale: the least power of two times which a scale in e4m3 can be it, int32."""
    share, power = torch.frexp(greatest.float().clamp(min=2.0**-126) / MOST)
    return power - (share == 0.5).to(torch.int32)


def octaves(ratio: Tensor) -> Tensor:
    """The exponents that e4m3 has for numbers (...): eight numbers an octave, and as many below the least normal one; int32."""
    return (torch.frexp(ratio).exponent - 1).clamp(min=LEAST)


def floated(ratio: Tensor) -> Tensor:
    """The nearest numbers of e4m3, ties to the even one, of ratios (...) from 0 on: fp32, not below its least."""
    ratio = ratio.clamp(min=2.0**-60)
    power = octaves(ratio) - MANTISSA
    return torch.ldexp(torch.ldexp(ratio, -power).round().clamp(min=1), power)


def to_bytes(ratio: Tensor) -> Tensor:
    """Numbers of e4m3 above 0 as its bits, uint8."""
    power = octaves(ratio)
    # a subnormal number has no 8 in its mantissa, and so the exponent below
    return ((power - LEAST) * 2**MANTISSA + torch.ldexp(ratio, MANTISSA - power)).to(torch.uint8)


def from_bytes(stored: Tensor) -> Tensor:
    """The numbers above 0 that bits of e4m3 stand for, fp32."""
    stored = stored.to(torch.int32)
    power = (stored >> MANTISSA).clamp(min=1)
    return torch.ldexp((stored - (power - 1) * 2**MANTISSA).float(), power - 1 + LEAST - MANTISSA)


def storable(scale: Tensor, grid: Grid) -> Tensor:
    """All scales of a matrix (n, g) as they can be stored beside each other: in bytes, those that are too far below the greatest are
    raised, in log8 over 8 octaves, in e4m3 over 14, of which the last three are coarse."""
    if grid.scales == "bf16" or not scale.numel():
        return scale.to(torch.bfloat16).float()
    if grid.scales == "e4m3":
        octave = octave_of(scale.max())
        return torch.ldexp(floated(torch.ldexp(scale.float(), -octave)), octave)
    number = notches(scale)
    return notched(number.clamp(min=int(number.max()) - SPAN + 1))


def rounded_scale(scale: Tensor, grid: Grid) -> Tensor:
    """A scale with the value that it is stored with."""
    if grid.scales == "e4m3":
        # whatever the power of two may be, a scale that is not too small beside it keeps so many bits
        share, power = torch.frexp(scale.float().clamp(min=2.0**-126))
        return torch.ldexp(torch.ldexp(share, torch.full_like(power, MANTISSA + 1)).round(), power - MANTISSA - 1)
    return scale.to(torch.bfloat16).float() if grid.scales == "bf16" else notched(notches(scale))


def _scale_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    top = 2**grid.bits - 1
    span = 2 * torch.maximum(-low, high) if grid.symmetric else high - low
    scale = rounded_scale(span / max(top, 1), grid)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.middle)
    return scale, (-low / scale * grid.zero_steps).round().div(grid.zero_steps).clamp(0, top)


def parted(zero: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros as whole numbers and what is over them: codes are round(w / scale + over) + whole."""
    whole = zero.floor()
    return whole, zero - whole


def fit_range(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero from least and greatest weight. weight (n, m) -> scale (n, g) fp32 with bf16 values, zero (n, g) whole numbers.
    A group of zeros gets scale 1, or the finest there is, so that nothing divides by zero."""
    return _scale_zero(*_ends(weight, grid), grid)


def reference_errors(runs: Tensor, weigh: Tensor | None, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """Squared errors of runs (n, g, width), each column weighted by weigh (1, g, width), rounded with each of some scales and zeros
    (steps, n, g) -> (steps, n, g)."""
    wholes, overs = parted(zeros)
    losses = torch.empty_like(scales)
    # many small groups are tried with all scales at once, few large ones with one after another
    some = max(1, _TRIED // max(runs.numel(), 1))
    for at in range(0, len(scales), some):
        s, z, whole, over = (x[at : at + some, ..., None] for x in (scales, zeros, wholes, overs))
        codes = (runs / s).add_(over).round_().add_(whole).clamp_(0, top)
        error = codes.sub_(z).mul_(s).sub_(runs).square_()
        losses[at : at + some] = (error if weigh is None else error.mul_(weigh)).sum(-1)
    return losses


# how many numbers a search for scales works on at a time
_TRIED = 2**20


def _errors(runs: Tensor, weigh: Tensor | None, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    there = native()
    given = [runs, scales, zeros, *([] if weigh is None else [weigh])]
    if there is None or any(x.dtype != torch.float32 or x.device.type != "cpu" for x in given):
        return reference_errors(runs, weigh, scales, zeros, top)
    tried = [x.contiguous() for x in (scales, *parted(zeros), zeros)]
    runs, weigh, losses = runs.contiguous(), None if weigh is None else weigh.contiguous(), torch.empty_like(tried[0])
    there.module.clip_losses(
        runs.data_ptr(), 0 if weigh is None else weigh.data_ptr(), [x.data_ptr() for x in tried], [*runs.shape, len(scales)], top,
        losses.data_ptr(), torch.get_num_threads(), there.level,
    )  # fmt: skip
    return losses


def fit_clipped(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, *, least: float = 0.4, steps: int = 16
) -> tuple[Tensor, Tensor]:
    """Scale and zero with both ends shrunk by the one factor of `steps` from 1 down to `least` that makes the squared error smallest,
    each column weighted by importance (m,), for instance the mean square of its input. Shapes as fit_range."""
    low, high = _ends(weight, grid)
    weigh = None if importance is None else grouped(importance[None, :].clamp(min=0), grid)
    runs = grouped(weight, grid)
    shrink = torch.tensor([1.0 - (1.0 - least) * i / max(steps - 1, 1) for i in range(steps)])[:, None, None]
    scales, zeros = _scale_zero(low * shrink, high * shrink, grid)
    losses = _errors(runs, weigh, scales, zeros, 2**grid.bits - 1)
    best = losses.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def fit_by_output(weight: Tensor, grid: Grid, gram: Tensor, *, least: float = 0.5, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Scale and zero with the ends of each group cut to the share of its largest size, one of 1 down to `least` in so many steps, by which
    the group's part of the output errs least: d G d^T, d its weights' errors, gram (m, m) the mean of x xT. Shapes as fit_range."""
    low, high = _ends(weight, grid)
    largest = torch.maximum(-low, high)
    runs, width = grouped(weight, grid), grid.width(weight.shape[1])
    blocks = torch.stack([F.pad(block, (0, width - len(block)) * 2) for block in _blocks(gram, width)])
    best = torch.full(low.shape, torch.inf)
    scale, zero = _scale_zero(low, high, grid)
    for i in range(steps + 1):
        share = 1.0 - (1.0 - least) * i / max(steps, 1)
        s, z = _scale_zero(torch.maximum(low, -share * largest), torch.minimum(high, share * largest), grid)
        whole, over = parted(z)
        codes = (runs / s[..., None]).add_(over[..., None]).round_().add_(whole[..., None]).clamp_(0, 2**grid.bits - 1)
        error = (codes.sub_(z[..., None]).mul_(s[..., None]) - runs).transpose(0, 1)
        loss = (error @ blocks).mul_(error).sum(-1).T
        better = loss < best
        best = torch.where(better, loss, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _blocks(gram: Tensor, width: int) -> list[Tensor]:
    """The square blocks of so many columns on the diagonal of a matrix, the last as wide as it comes."""
    return [gram[i : i + width, i : i + width] for i in range(0, gram.shape[0], width)]


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """rounded, with the gradient of x. Bengio et al. 2013, arXiv:1308.3432, the straight-through estimator."""
    return x + (rounded - x).detach()


def as_stored(scale: Tensor, grid: Grid) -> Tensor:
    """A learned scale with the value that it is stored with; its gradient passes that rounding."""
    return through(scale, rounded_scale(scale.detach(), grid))


def encode(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Nearest codes, (n, m) uint8."""
    m = weight.shape[1]
    whole, over = parted(zero)
    codes = (grouped(weight, grid) / scale[..., None]).add_(over[..., None]).round_().add_(whole[..., None]).clamp_(0, 2**grid.bits - 1)
    return codes.reshape(weight.shape[0], -1)[:, :m].to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The weights that codes stand for, (n, m) fp32."""
    m = codes.shape[1]
    runs = grouped(codes.float(), grid)
    return runs.sub_(zero[..., None]).mul_(scale[..., None]).reshape(codes.shape[0], -1)[:, :m]
