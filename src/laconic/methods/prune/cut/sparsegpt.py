"""SparseGPT: drops weights where the least output error follows, column by column, and moves the rest so as to make up for each error.

Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1; n:m runs of section 3.3, joint rounding of section 3.5.  With U the upper
Cholesky factor of the inverse Hessian, dropping w_c costs w_c^2 / U_cc^2 once the columns before it are settled; e = (w_c - q_c) / U_cc,
w_j -= e U_cj for j > c, where q_c is 0 for what goes and, on a grid, its nearest point for what stays.  Masks are chosen anew every
`block` columns (over all rows; within each row where a grid needs rows that keep alike), or at each n:m run.
weight (n, m), gram (m, m), Sparsity -> Sparse(mask, values), in as many bytes as prune.cut.drop at that level.  A group's scale is fitted
when a row reaches its first weight.  Weights of channels that saw no activation go first; a singular Hessian is damped until it factors;
notes say both.  ValueError where a grid is asked for without a `hold` that takes it.
Sibling: prune.cut.drop (any score, all at once; what stays stays as it is)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.score import Everywhere, NofM, PerRow, keep_top
from laconic.core.site import Conv, Linear, Site
from laconic.core.statistic import Gram, by_rows
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid, fit_range
from laconic.kernels.obs import Factor, Window, inverse_factor, remarks, sweep
from laconic.methods.prune.cut.drop import Sparsity, hold_kept, stored_bytes
from laconic.methods.prune.cut.sparse import Sparse

CARD = Card(Paper("Frantar and Alistarh", 2023, "arXiv:2301.00774", "algorithm 1"), catalogue="", sibling="prune.cut.drop")


class Pruned(NamedTuple):
    """weight (n, m) fp32 with zeros where mask (n, m) is false; fit: on a grid `scale` and `zero` (n, g) of the groups of kept weights."""

    weight: Tensor
    mask: Tensor
    fit: dict[str, Tensor]


def saliency(weight: Tensor, factor: Factor, columns: slice) -> Tensor:
    """weight (n, c) as the sweep has it at some columns -> (n, c), the root of the error that dropping each would cause; below zero for
    dead channels, where that error is none, and by magnitude among them."""
    score = weight.abs().double() / factor.upper.diagonal()[columns]
    top = score.amax().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(factor.dead[columns], score / top - 2, score)


def choose(weight: Tensor, factor: Factor, level: Sparsity, columns: slice) -> Tensor:
    """weight (n, c) as the sweep has it at columns [start, stop) -> mask (n, c) of what stays. Shares are even from block to block, and
    over all blocks n * level.kept(m) weights stay."""
    n, m = weight.shape[0], factor.upper.shape[0]
    score = saliency(weight, factor, columns)
    if level.run is not None:
        return keep_top(score, 1.0, among=NofM(round(level.keep * level.run), level.run))
    if level.grid is not None:
        kept = level.kept(m)
        return keep_top(score, kept * columns.stop // m - kept * columns.start // m, among=PerRow())
    # the paper's rule; against shares within each row it is better on some models and worse on others
    kept = n * level.kept(m)
    return keep_top(score, kept * columns.stop // m - kept * columns.start // m, among=Everywhere())


class _Groups:
    """The grids of a sweep: each row's kept weights in groups, in order of column."""

    def __init__(self, n: int, kept: int, m: int, grid: Grid, factor: Factor) -> None:
        self.grid, self.factor = grid, factor
        self.width = grid.width(kept)
        # columns that hold about as many kept weights as a group
        self.reach = -(-self.width * m // kept)
        self.scale, self.zero = torch.ones(n, grid.count(kept)), torch.zeros(n, grid.count(kept))
        self.taken = torch.zeros(n, dtype=torch.long)

    def rounded(self, window: Window, i: int, keep: Tensor) -> Tensor:
        """(n,) the window's i-th column on its groups' grids, meant where keep (n,) is true. A group that begins here is fitted to as many
        weights as it will have, those of the columns ahead that look as if they stayed."""
        at = window.start + i
        group = (self.taken // self.width).clamp(max=self.scale.shape[1] - 1)
        begins = (keep & (self.taken % self.width == 0)).nonzero()[:, 0]
        if begins.numel():
            end = min(at + self.reach, self.factor.upper.shape[0])
            near = window.ahead(i, begins, end)
            likely = keep_top(saliency(near, self.factor, slice(at, end)), min(self.width, end - at), among=PerRow())
            likely[:, 0] = True
            scale, zero = fit_range(near * likely, self.grid.row)
            self.scale[begins, group[begins]], self.zero[begins, group[begins]] = scale[:, 0], zero[:, 0]
        self.taken += keep
        scale, zero = self.scale.gather(1, group[:, None])[:, 0], self.zero.gather(1, group[:, None])[:, 0]
        codes = (window.inside[i] / scale + zero).round_().clamp_(0, 2**self.grid.bits - 1)
        return (codes - zero) * scale


def sparsegpt(weight: Tensor, factor: Factor, level: Sparsity, *, block: int = 128) -> Pruned:
    """weight (n, m) -> what stays of it, errors made up for. Blocks are cut to whole n:m runs."""
    n, m = weight.shape
    if level.run is not None:
        block = max(block // level.run, 1) * level.run
    step = block if level.run is None else level.run
    out, mask = torch.empty(n, m), torch.empty(n, m, dtype=torch.bool)
    groups = None if level.grid is None else _Groups(n, level.kept(m), m, level.grid, factor)

    def settle(window: Window, i: int) -> Tensor:
        at = window.start + i
        if i % step == 0:
            end = min(at + step, window.stop)
            mask[:, at:end] = choose(window.inside[i : end - window.start].T, factor, level, slice(at, end))
        w, keep = window.inside[i], mask[:, at]
        stays = w if groups is None else groups.rounded(window, i, keep)
        out[:, at] = torch.where(keep, stays, 0.0)
        return w - out[:, at]

    sweep(weight.float().clone(), factor.upper, settle, block=block)
    return Pruned(out, mask, {} if groups is None else {"scale": groups.scale, "zero": groups.zero})


@dataclass(frozen=True)
class SparseGPT(Transform):
    """hold: how rounded weights are held (needed where the level has a grid); damping: fraction of the Hessian's mean diagonal;
    block: columns between mask selections and lazy updates."""

    hold: Transform | None = None
    damping: float = 0.01
    block: int = 128

    acts_on = (Linear, Conv)
    level = Sparsity
    wants = (Gram(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Sparsity) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Sparsity]) -> Iterator[Change]:
        """All levels with one factorization."""
        weight = weights["weight"].reshape(site.matrix)
        parts = [(rows, inverse_factor(gram, self.damping)) for rows, gram in by_rows(stats[Gram()], site.matrix[0])]
        notes = remarks(site.name, [factor for _, factor in parts], self.damping, "lost its weights first")
        for level in levels:
            found = [sparsegpt(weight[rows], factor, level, block=self.block) for rows, factor in parts]
            mask = torch.cat([one.mask for one in found])
            kept = Sparse.gather(torch.cat([one.weight for one in found]), mask)
            fit = {name: torch.cat([one.fit[name] for one in found]) for name in found[0].fit}
            values = hold_kept(site, kept if fit else kept.to(weight.dtype), level, self.hold, fit)
            if fit and not torch.equal(values.dense(), kept):
                raise ValueError("`hold` does not hold weights on the grid they were rounded to; use quantize.round.rtn")
            yield Change(hold={site.tensors["weight"]: Sparse.of(site.shape, mask, values)}, notes=notes)

    def stored(self, site: Site, level: Sparsity) -> int:
        return stored_bytes(site, level, self.hold)
