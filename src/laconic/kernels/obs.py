"""The optimal-brain-surgeon solver behind GPTQ and its kin: round column by column, push each error onto the columns not yet rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from laconic.kernels.grids import Grid, fit_clipped, fit_range


class Factor(NamedTuple):
    """Upper Cholesky factor (m, m) of the inverse damped Hessian, the columns that no token ever moved, and the damping that was needed."""

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Factor:
    """gram (m, m), mean of x xT, may be singular, zero or slightly indefinite -> its inverse's upper Cholesky factor, never NaN.

    Dead columns (no input) get a unit diagonal. `damping` is a fraction of the mean diagonal; it is raised tenfold until both
    factorizations succeed. Entries that are not finite are refused."""
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix has entries that are not finite: an activation overflowed, calibrate in float32")
    hessian = gram.double() if gram.shape[0] <= 2048 else gram.clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.any()):
        hessian = hessian.clone()
        hessian[dead, :] = 0
        hessian[:, dead] = 0
    scale = hessian.diagonal()[~dead].mean() if bool((~dead).any()) else torch.ones((), dtype=hessian.dtype)
    hessian = hessian / scale
    hessian.diagonal()[dead] = 1.0
    used = damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(used)
        lower, bad = torch.linalg.cholesky_ex(damped)
        if not int(bad):
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(bad) and bool(torch.isfinite(upper).all()):
                return Factor(upper.float(), dead, used)
        used = max(used * 10, 1e-6)


class Rounded(NamedTuple):
    """codes (n, m) uint8, scale and zero (n, g)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def round_columns(
    weight: Tensor, factor: Factor, grid: Grid, *, importance: Tensor | None = None, block: int = 128, order: Tensor | None = None
) -> Rounded:
    """Rounds weight (n, m) to the grid column by column with error compensation.

    importance (m,): when given, each group's range is clipped for least error under it instead of taking least and greatest weight.
    order (m,): a permutation in which to visit the columns; scales are then fixed beforehand from the weights as they are (static
    groups), else each group's scale is fitted when the walk reaches it, from weights that carry the errors so far."""
    n, m = weight.shape
    work = weight.float().clone()
    codes = torch.empty(n, m, dtype=torch.uint8)
    top = 2**grid.bits - 1
    group_of = grid.index(m)

    def fit(columns: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
        inner = Grid(grid.bits, None, grid.symmetric)
        if importance is None:
            return fit_range(columns, inner)
        return fit_clipped(columns, inner, importance[chosen])

    scale, zero = fit_range(work, grid) if importance is None else fit_clipped(work, grid, importance)
    fixed = order is not None
    visit = torch.arange(m) if order is None else order
    upper = factor.upper
    if fixed:
        # the factor of the permuted problem; damping stays as it was found
        work = work[:, visit]
    diagonal = upper.diagonal().tolist()
    width = grid.width(m)
    columns = visit.tolist()
    for start in range(0, m, block):
        stop = min(start + block, m)
        inside = work[:, start:stop].clone()
        errors = torch.empty_like(inside)
        for i in range(stop - start):
            at = start + i
            column = columns[at]
            g = int(group_of[column])
            if not fixed and column % width == 0:
                end = min(column + width, m)
                # columns of this group beyond the block have not had this block's earlier errors yet: add them for the fit
                ahead = work[:, max(stop, column) : end] - errors[:, :i] @ upper[start:at, max(stop, column) : end] if end > stop else work[:, :0]
                here = inside[:, i : min(end, stop) - start]
                s, z = fit(torch.cat([here, ahead], 1), slice(column, end))
                scale[:, g], zero[:, g] = s[:, 0], z[:, 0]
            w = inside[:, i]
            s_g, z_g = scale[:, g], zero[:, g]
            q = torch.round(w / s_g).add_(z_g).clamp_(0, top)
            codes[:, column] = q.to(torch.uint8)
            error = (w - (q - z_g) * s_g) / diagonal[at]
            errors[:, i] = error
            if i + 1 < stop - start:
                inside[:, i + 1 :].addr_(error, upper[at, at + 1 : stop], alpha=-1.0)
        if stop < m:
            work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1.0)
    return Rounded(codes, scale, zero)


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """delta (n, m), gram (m, m) -> (n,) mean squared error of each output channel."""
    return ((delta @ gram) * delta).sum(1)


def predicted_loss(delta: Tensor, gram: Tensor, fisher: Tensor) -> float:
    """Nats a token at the model's output to second order, channels taken as independent: half the Fisher diagonal (n,) times each
    channel's mean squared error."""
    return float(0.5 * (fisher.double() * output_error(delta, gram).double().clamp(min=0)).sum())
