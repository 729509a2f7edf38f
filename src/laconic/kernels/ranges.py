"""Ranges of inputs: clusters of (least, greatest) pairs, even steps between the two ends of each cluster, and logarithms of shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.kernels.grids import through

# how often the means of clusters move at most
ROUNDS = 100


def clustered(points: Tensor, count: int) -> Tensor:
    """points (n, d) -> number of its cluster for each, (n,) int64, by k-means (Lloyd 1982, 10.1109/TIT.1982.1056489): means begin at points
    evenly spaced in the order of their spread, greatest less least coordinate, and move until none does."""
    count = min(count, len(points))
    order = (points.amax(1) - points.amin(1)).argsort(stable=True)
    means = points[order[torch.arange(count) * (len(points) - 1) // max(count - 1, 1)]].double()
    found = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        nearest = (points.double()[:, None] - means).square().sum(-1).argmin(1)
        if torch.equal(nearest, found):
            break
        found = nearest
        member = torch.nn.functional.one_hot(found, count).double()
        size = member.sum(0)
        means = torch.where(size[:, None] > 0, member.T @ points.double() / size.clamp(min=1)[:, None], means)
    return found


def ends_of(low: Tensor, high: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each cluster, (count,), zero always inside; low, high, index (n,)."""
    ends = [torch.zeros(count).scatter_reduce(0, index, end, "amax") for end in (-low, high)]
    return -ends[0], ends[1]


def steps_of(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero, a whole number, of 2^bits even steps from low to high, zero inside; a range of nothing has the scale 1. Any shape."""
    scale = (high - low).clamp(min=0) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def evenly(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x to the nearest of 2^bits even steps, what is beyond to the ends; the gradient passes as if nothing was rounded."""
    codes = (x.detach().float() / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return through(x, codes.sub_(zero).mul_(scale).to(x.dtype))


@dataclass(frozen=True, eq=False)
class Spans:
    """Inputs x (..., m) go to even steps of their group's range, what is beyond to its ends.

    index: group of each channel (m,) or of each position (t,), uint8; scale, zero (g,) fp32. A position beyond the last is taken for it."""

    bits: int
    axis: Literal["channels", "positions"]
    index: Tensor
    scale: Tensor
    zero: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        at = self.index.long()
        if self.axis == "positions":
            t = x.shape[-2] if x.dim() > 1 else 1
            at = at[torch.arange(t, device=at.device).clamp(max=len(at) - 1)][:, None]
        return evenly(x, self.scale[at], self.zero[at], self.bits)


@dataclass(frozen=True, eq=False)
class Beyond:
    """Inputs x (..., t, m) go to even steps of one range, what is beyond to its ends; where there is a `first` (m,), it stands in the place
    of the first position. scale, zero (1,) fp32."""

    bits: int
    first: Tensor | None
    scale: Tensor
    zero: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if self.first is None:
            return evenly(x, self.scale, self.zero, self.bits)
        first = self.first.to(x.dtype).expand_as(x[..., :1, :])
        return torch.cat([first, evenly(x[..., 1:, :], self.scale, self.zero, self.bits)], -2)


def powers(shares: Tensor, greatest: Tensor, bits: int) -> Tensor:
    """shares (...) from 0 on to greatest times a power of a half, 1 to 2^-(2^bits - 1), nearest by the logarithm; greatest has a shape that
    goes with theirs; the gradient passes as if nothing was rounded."""
    greatest = greatest.float().clamp(min=2.0**-120)
    # none below what is left of a normal number
    codes = -(shares.detach().float() / greatest).clamp(min=2.0**-126).log2()
    halved = torch.ldexp(torch.ones_like(codes), -codes.round_().clamp_(0, 2**bits - 1).int())
    return through(shares, (halved * greatest).to(shares.dtype))


def apart(shares: Tensor, bits: int, greatest: Tensor | None = None) -> Tensor:
    """Shares of keys (b, h, t, s), the first of which stay as they are, the others powers of a half times the greatest of all others in the
    same map (h, t, s - 1) as it comes, unless one is given."""
    first, rest = shares[..., :1], shares[..., 1:]
    if not rest.shape[-1]:
        return shares
    return torch.cat(
        [first, powers(rest, rest.detach().amax(tuple(range(1, rest.dim())), keepdim=True) if greatest is None else greatest, bits)], -1
    )
