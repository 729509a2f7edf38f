"""Inputs of a product in few bits: on an integer grid or in floats of each token's own scale, found as it comes, or in floats of a scale
that was found beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.kernels.grids import MANTISSA, octaves, through
from laconic.kernels.levels import GREATEST as TOP
from laconic.kernels.levels import Levels, ranked


def rounded(x: Tensor, bits: int, axes: int = 1) -> Tensor:
    """x (..., m) to the nearest of 2^bits - 1 points that lie evenly about zero, the outermost at the largest entry of the token: its last
    axis, or its last `axes`. A token of zeros stays. The gradient passes as if nothing was rounded."""
    scale = _outermost(x, bits, axes)
    return through(x, ((x.detach().float() / scale).round() * scale).to(x.dtype))


def stepped(x: Tensor, bits: int, share: Tensor, axes: int = 1) -> Tensor:
    """As `rounded`, the outermost point at so large a share of the token's largest entry, share (1,), what is beyond going there. The share
    has the gradient of a learned step (Esser et al. 2020, arXiv:1902.08153, eq. 3): the error in steps where x is inside, the outermost
    point where it is beyond; there x has none."""
    top = 2 ** (bits - 1) - 1
    scale = _outermost(x, bits, axes) * share
    wished = x.float() / scale
    return (through(wished, wished.detach().round()).clamp(-top, top) * scale).to(x.dtype)


def _outermost(x: Tensor, bits: int, axes: int) -> Tensor:
    """The step with which the last of the points is at the largest entry of a token."""
    scale = x.detach().float().abs().amax(tuple(range(-axes, 0)), keepdim=True) / (2 ** (bits - 1) - 1)
    return scale.masked_fill(scale == 0, 1.0)


def floating(x: Tensor, axes: int = 1) -> Tensor:
    """As `rounded`, to the numbers of e4m3, the greatest of which, 448, is at the largest entry; scales are bf16's."""
    whole = x.detach().float()
    scale = (whole.abs().amax(tuple(range(-axes, 0)), keepdim=True) / TOP).bfloat16().float()
    ratio = whole / scale.masked_fill(scale == 0, 1.0)
    power = octaves(ratio) - MANTISSA
    near = torch.ldexp(torch.ldexp(ratio, -power).round(), power).clamp(-TOP, TOP)
    return through(x, (near * scale).to(x.dtype))


@dataclass(frozen=True, eq=False)
class Floats:
    """Inputs x (..., m) go to the nearest number of a float format times scale 2^-shift of their channel, what is beyond to the greatest.

    levels: of the format; shifts (m,) int8; scale (1,) fp32. The gradient passes as if nothing was rounded."""

    levels: Levels
    shifts: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        _, rising, bounds = ranked(self.levels, None)
        near = rising.to(x.device)[torch.bucketize(self.shifted(x.detach().float()) / self.scale, bounds.to(x.device))] * self.scale
        return through(x, torch.ldexp(near, -self.shifts.int()).to(x.dtype))

    def shifted(self, x: Tensor) -> Tensor:
        """x with every channel in units of its own exponent: exact."""
        return torch.ldexp(x, self.shifts.int())
