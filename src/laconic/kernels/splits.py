"""Floats of few bits in any split of exponent and mantissa, every code a number: no infinities, no NaN.

With e bits of exponent, m of mantissa and one of sign a number is (-1)^s 2^(E - b) (1 + M / 2^m), or (-1)^s 2^(1 - b) M / 2^m where E = 0,
b = 2^(e-1) - 1; a scale 2^-c moves the bias by c, whole or not. Numbers of one sign in order of size have the codes 0, 1, 2, ..., so a
number is named by its rank too, -(2^(e+m) - 1) to 2^(e+m) - 1, zero in the middle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.kernels.grids import through


@dataclass(frozen=True)
class Split:
    """How the bits of a float are used, exponent 1 to 5, mantissa 0 or more; one exponent bit alone makes even steps."""

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if not 1 <= self.exponent <= 5 or not 0 <= self.mantissa <= 6:
            raise ValueError(f"e{self.exponent}m{self.mantissa}: a float of few bits has 1 to 5 bits of exponent and 0 to 6 of mantissa")

    @property
    def bits(self) -> int:
        """Of a number, its sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def least(self) -> int:
        """The exponent of the least normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def last(self) -> int:
        """The greatest rank."""
        return 2 ** (self.bits - 1) - 1  # type: ignore[no-any-return]

    @property
    def top(self) -> float:
        """The greatest number."""
        return float(numbers(torch.tensor(self.last), self))


def splits(bits: int) -> list[Split]:
    """Those that are tried for so many bits: of 4 bits all, of more those with 2 bits of exponent to 5."""
    tried = range(1 if bits <= 4 else 2, min(5, bits - 1) + 1)
    return [Split(exponent, bits - 1 - exponent) for exponent in tried]


def numbers(rank: Tensor, split: Split) -> Tensor:
    """The numbers (...) fp32 of ranks (...), whole."""
    size = rank.abs().to(torch.int32)
    binade = (size >> split.mantissa).clamp(min=1)
    found = torch.ldexp((size - ((binade - 1) << split.mantissa)).float(), binade - 1 + split.least - split.mantissa)
    return torch.where(rank < 0, -found, found)


def _units(ratio: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Sizes (...) in steps of their own binade, not yet whole, and how many steps lie below its first number less that number in steps."""
    power = torch.where(ratio > 0, torch.frexp(ratio).exponent - 1, split.least).clamp(min=split.least)
    return torch.ldexp(ratio, split.mantissa - power), (power - split.least) << split.mantissa


def nearest(ratio: Tensor, split: Split) -> Tensor:
    """Ranks (...) int32 of the nearest numbers, ties to the even one, what is beyond to the greatest."""
    steps, before = _units(ratio.abs().clamp(max=split.top), split)
    return (torch.copysign(steps.round() + before, ratio)).to(torch.int32)


def under(ratio: Tensor, split: Split) -> Tensor:
    """Ranks (...) int32 of the greatest numbers that are not above, at least the least number and below the greatest."""
    steps, before = _units(ratio.abs().clamp(max=split.top), split)
    rank = torch.where(ratio < 0, -(steps.ceil() + before), steps.floor() + before)
    return rank.to(torch.int32).clamp(-split.last, split.last - 1)


def to_codes(rank: Tensor, split: Split) -> Tensor:
    """Ranks (...) as codes, uint8: the sign above size."""
    return (rank.abs().to(torch.int32) + torch.where(rank < 0, split.last + 1, 0)).to(torch.uint8)


def from_codes(codes: Tensor, split: Split) -> Tensor:
    """The ranks (...) int32 of codes."""
    size = codes.to(torch.int32)
    return torch.where(size > split.last, split.last + 1 - size, size)


def scales(greatest: Tensor, split: Split, most: float, least: float, steps: int) -> Tensor:
    """Scales (steps + 1,) fp32 with which the greatest number is all of the greatest size, and shares of it from `most` down to `least`."""
    shares = torch.cat([torch.ones(1), torch.linspace(most, least, steps)]).to(greatest.device)
    return (greatest.float().clamp(min=2.0**-100) * shares / split.top).reshape(-1)


def searched(x: Tensor, greatest: Tensor, tried: list[Split], *, most: float, least: float, steps: int) -> tuple[Split, Tensor]:
    """The split and scale (1,) of least squared error of x; the first of several."""
    best, found = torch.inf, (tried[0], torch.ones(1))
    for split in tried:
        for scale in scales(greatest, split, most, least, steps):
            error = float((rounded(x, split, scale) - x).double().square().sum())
            if error < best:
                best, found = error, (split, scale.reshape(1))
    return found


def rounded(x: Tensor, split: Split, scale: Tensor) -> Tensor:
    """x (...) fp32 to the nearest numbers times a scale."""
    return numbers(nearest(x / scale, split), split) * scale


@dataclass(frozen=True, eq=False)
class Floated:
    """Inputs of any shape to the nearest number times scale (1,); the gradient passes as if nothing was rounded."""

    split: Split
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return through(x, rounded(x.detach().float(), self.split, self.scale).to(x.dtype))
