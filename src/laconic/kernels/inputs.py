"""Inputs of a product on an integer grid, one scale for each token, found as it comes."""

from __future__ import annotations

from torch import Tensor

from laconic.kernels.grids import through


def rounded(x: Tensor, bits: int, axes: int = 1) -> Tensor:
    """x (..., m) to the nearest of 2^bits - 1 points that lie evenly about zero, the outermost at the largest entry of the token: its last
    axis, or its last `axes`. A token of zeros stays. The gradient passes as if nothing was rounded."""
    top = 2 ** (bits - 1) - 1
    whole = x.detach().float()
    scale = whole.abs().amax(tuple(range(-axes, 0)), keepdim=True) / top
    scale = scale.masked_fill(scale == 0, 1.0)
    return through(x, ((whole / scale).round() * scale).to(x.dtype))
