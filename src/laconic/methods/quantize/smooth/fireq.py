"""FireQ: channels scaled so that weights in 4 bits with scales in fp8 lose less, and keys in 4 bits on either side of their rotation.

Baek et al. 2025, arXiv:2505.20839, with the constants of the authors' code. Three scales, of which the first two are here:
linear: s_j = x_j^a / w_j^(1 - a), x_j and w_j the mean sizes of an input channel and of its weights, goes into the weights and 1 / s into
the norm before them, or into up; a is the one of -0.1, 0, 0.1 ... 1, or none, by which outputs err least (||Q(W diag(s)) diag(s)^-1 X -
W X||^2, one for all matrices that share an input).
Before positions turn keys: channels i and i' of a rotary pair get the one factor alpha / max_t sqrt(k_i^2 + k_i'^2), which no turn changes,
folded into W_k, its inverse into W_q. In units of the head's median pair, since a head's common factor is nothing to codes with a scale a
token. The `top_k` loudest pairs stay for the third scale, which follows the turn: cache.store.fireq's.
Weights are quantize.round.inputs(hold=quantize.round.rtn)'s at {bits: 4, group: 128, symmetric: true, scales: e4m3}, inputs: e4m3; its
grid spans 7.5 steps either side where the authors' has 7. `entries` is what their kernel looks up.
weight (n, m), gram (m, m), sizes (m,) -> s (m,); radii (k, d) of keys -> factors (k, d).
Sibling: quantize.smooth.awq (by mean inputs alone)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.site import Edge, Paired, Site
from laconic.core.statistic import Gram, Seen, Sizes, Statistic
from laconic.core.transform import Align, Change, Stats, Stretched
from laconic.kernels.grids import Grid, floated, grouped, ungrouped
from laconic.methods.quantize.smooth.awq import FLOOR, columns, loss, matrices

CARD = Card(Paper("Baek et al.", 2025, "arXiv:2505.20839"), catalogue="fireq", sibling="quantize.smooth.awq")


def entries(scale: Tensor, octave: int, float8: bool) -> Tensor:
    """Scales (n, g) of 4-bit codes and the power of two of their matrix -> table (n, g, 16) of -8 to 7 times each. float8: as the authors'
    kernel has it, rounded to e4m3 before the power of two comes in, so that tensor cores for fp8 take it; else exact, in bf16's range."""
    table = torch.arange(-8.0, 8.0) * scale[..., None]
    if not float8:
        return table
    ratio = torch.ldexp(table, torch.tensor(-octave))
    return torch.ldexp(torch.where(ratio == 0, 0.0, ratio.sign() * floated(ratio.abs())), torch.tensor(octave))


def looked_up(codes: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """Codes 0 to 15 (n, m) and the table of each group (n, g, 16) -> weights (n, m): one look, no arithmetic."""
    return ungrouped(table.gather(-1, grouped(codes.float(), grid).long()), codes.shape[1])


def balanced(inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """Mean sizes of input channels and of their weights (m,) -> s (m,), the product of its greatest and least being 1; 1 where either is
    dead."""
    live = (inputs > FLOOR * inputs.max()) & (weights > FLOOR * weights.max())
    s = inputs.clamp(min=1e-30).pow(exponent) / weights.clamp(min=1e-30).pow(1 - exponent)
    if not bool(live.any()):
        return torch.ones_like(s)
    s = s / (s[live].max() * s[live].min()).sqrt()
    return torch.where(live, s, torch.ones_like(s))


def paired(radii: Tensor, half: int, alpha: float, top_k: int) -> Tensor:
    """Greatest radii of keys (k, d), those of channels i and i + half being equal -> factors (k, d) alike; those of the loudest top_k
    pairs are 1."""
    # of channels that nothing turns each counts for itself
    alone = torch.cat([radii[:, :half], radii[:, 2 * half :]], 1)
    live = alone > FLOOR * alone.amax(1, keepdim=True).clamp(min=1e-30)
    level = alone.masked_fill(~live, torch.nan).nanmedian(1, keepdim=True).values
    factors = torch.where(live, alpha * level / alone.clamp(min=1e-30), torch.ones_like(alone))
    loudest = alone.topk(min(top_k, alone.shape[1]), 1).indices
    factors = factors.scatter(1, loudest, 1.0)
    return torch.cat([factors[:, :half], factors[:, :half], factors[:, half:]], 1)


@dataclass(frozen=True)
class Radii(Statistic):
    """Of each output of a matrix in heads of `block` channels the greatest sqrt(y_i^2 + y_i'^2) over tokens, (n,): i and i + half of a
    head are a pair, channels from 2 half on stand alone."""

    block: int
    half: int
    needs = frozenset({"y"})

    def init(self, site: Site) -> Tensor:
        return torch.zeros(site.matrix[0])

    def update(self, state: Tensor, seen: Seen) -> Tensor:
        assert seen.y is not None
        y = (seen.y if seen.mask is None else seen.y[seen.mask]).float()
        if not len(y):
            return state
        heads = y.unflatten(1, (-1, self.block))
        first, second, rest = heads.split([self.half, self.half, self.block - 2 * self.half], -1)
        radius = torch.hypot(first, second)
        return torch.maximum(state, torch.cat([radius, radius, rest.abs()], -1).flatten(1).amax(0))

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    def finish(self, state: Tensor) -> Tensor:
        return state


@dataclass(frozen=True)
class FireQ(Align):
    """linear: whether channels of inputs are scaled; rotary: whether keys are, before positions turn them. alpha: to what they are scaled;
    top_k: pairs of a head that are left to the cache. bits, group: of the grid that channels are scaled for."""

    linear: bool = True
    rotary: bool = True
    alpha: float = 1.0
    top_k: int = 3
    bits: int = 4
    group: int | None = 128

    def __post_init__(self) -> None:
        Grid(self.bits, self.group)
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}: keys are scaled to something above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: 0 pairs or more are left to the cache")

    def looks(self, edge: Edge) -> tuple[tuple[Site, Statistic], ...]:
        if (act := edge.may(Paired)) is not None:
            return ((edge.writers[0].site, Radii(edge.block, act.half)),) if self.rotary else ()
        # entries of v stay: what they meet is a mixture of tokens
        if not self.linear or edge.block != edge.width or not matrices(edge):
            return ()
        return tuple((edge.readers[0].site, statistic) for statistic in (Gram(), Sizes()))

    def __call__(self, edge: Edge, read: Callable[[Site], Tensor], stats: Mapping[str, Stats]) -> Change:
        for site, statistic in self.looks(edge):
            # an expert may have seen nothing
            if statistic not in stats.get(site.name, {}):
                return Change()
        if not self.looks(edge):
            return Change()
        if (act := edge.may(Paired)) is not None:
            ((site, statistic),) = self.looks(edge)
            at = torch.tensor([edge.writers[0].index(i)[0] for i in range(edge.width)])
            radii = stats[site.name][statistic][at].unflatten(0, (-1, edge.block))
            return Change(move=((edge, Stretched(paired(radii, act.half, self.alpha, self.top_k).flatten())),))
        s = self._searched(edge, read, stats[edge.readers[0].site.name])
        return Change() if s is None else Change(move=((edge, Stretched(1 / s)),))

    def _searched(self, edge: Edge, read: Callable[[Site], Tensor], seen: Stats) -> Tensor | None:
        """The scale by which outputs err least, None where none is better."""
        at, weights = columns(edge), [read(member.site) for member in matrices(edge)]
        sizes = seen[Sizes()][at].mean(1)
        loud = torch.cat(weights).abs().mean(0)[at].mean(1)
        grid = Grid(self.bits, self.group, symmetric=True, scales="e4m3")
        tried = [torch.ones_like(sizes), *(balanced(sizes, loud, i / 10) for i in range(-1, 11))]
        losses = [loss(weights, seen[Gram()], torch.ones(at.numel()).index_put((at,), s[:, None]), grid) for s in tried]
        best = min(range(len(tried)), key=losses.__getitem__)
        return tried[best] if best else None
