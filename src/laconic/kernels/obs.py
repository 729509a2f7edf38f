"""The optimal-brain-surgeon solver behind GPTQ and its kin: round column by column, push each error onto the columns not yet rounded."""

from __future__ import annotations

from collections.abc import Sequence
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
    weight: Tensor,
    factor: Factor,
    grids: Sequence[Grid],
    *,
    importance: Tensor | None = None,
    block: int = 128,
    order: Tensor | None = None,
) -> list[Rounded]:
    """Rounds weight (n, m) column by column with error compensation, to each of several grids in one sweep: rows are independent of one
    another, so grids are stacked as rows and share the factor and every step.

    importance (m,): when given, each group's range is clipped for least error under it instead of taking least and greatest weight.
    order (m,): a permutation in which to visit the columns; scales are then fixed beforehand from the weights as they are (static
    groups), else each group's scale is fitted when the walk reaches it, from weights that carry the errors so far."""
    n, m = weight.shape
    count = len(grids)
    fixed = order is not None
    visit = torch.arange(m) if order is None else order
    columns = visit.tolist()
    base = weight.float()

    def fit(values: Tensor, grid: Grid, chosen: slice) -> tuple[Tensor, Tensor]:
        return fit_range(values, grid) if importance is None else fit_clipped(values, grid, importance[chosen])

    scales, zeros = [torch.empty(n, grid.count(m)) for grid in grids], [torch.empty(n, grid.count(m)) for grid in grids]
    if fixed:
        for scale, zero, grid in zip(scales, zeros, grids, strict=True):
            scale[:], zero[:] = fit(base, grid, slice(None))
    widths = [grid.width(m) for grid in grids]
    whole_rows = [Grid(grid.bits, None, grid.symmetric) for grid in grids]
    # one row for each (grid, output channel); scale and zero of the column at hand
    work = base[:, visit].repeat(count, 1)
    top = torch.tensor([2.0**grid.bits - 1 for grid in grids]).repeat_interleave(n)
    s_now, z_now = torch.empty(count * n), torch.empty(count * n)
    codes = torch.empty(m, count * n, dtype=torch.uint8)
    upper = factor.upper
    diagonal = upper.diagonal().tolist()
    for start in range(0, m, block):
        stop = min(start + block, m)
        # columns as rows: each step then works on contiguous memory
        inside = work[:, start:stop].T.contiguous()
        errors = torch.empty_like(inside)
        for i in range(stop - start):
            at = start + i
            column = columns[at]
            for level in range(count):
                rows = slice(level * n, (level + 1) * n)
                group, into = divmod(column, widths[level])
                if not fixed and into == 0:
                    end = min(column + widths[level], m)
                    here = inside[i : min(end, stop) - start, rows].T
                    if end > stop:
                        # columns of this group beyond the block have not had this block's earlier errors yet
                        ahead = work[rows, stop:end] - errors[:i, rows].T @ upper[start:at, stop:end]
                        here = torch.cat([here, ahead], 1)
                    s, z = fit(here, whole_rows[level], slice(column, end))
                    scales[level][:, group], zeros[level][:, group] = s[:, 0], z[:, 0]
                    s_now[rows], z_now[rows] = s[:, 0], z[:, 0]
                elif fixed:
                    s_now[rows], z_now[rows] = scales[level][:, group], zeros[level][:, group]
            w = inside[i]
            q = torch.addcdiv(z_now, w, s_now).round_().clamp_(min=0)
            q = torch.minimum(q, top, out=q)
            codes[column] = q
            error = torch.addcmul(w, q - z_now, s_now, value=-1.0).div_(diagonal[at])
            errors[i] = error
            if i + 1 < stop - start:
                inside[i + 1 :].addr_(upper[at, at + 1 : stop], error, alpha=-1.0)
        if stop < m:
            work[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1.0)
    split = [codes[:, level * n : (level + 1) * n].T.contiguous() for level in range(count)]
    return [Rounded(*found) for found in zip(split, scales, zeros, strict=True)]


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """delta (n, m), gram (m, m) or (g, m, m) of n / g rows each -> (n,) mean squared error of each output channel."""
    if gram.dim() == 3:
        apart = delta.reshape(gram.shape[0], -1, delta.shape[1])
        return ((apart @ gram) * apart).sum(2).reshape(-1)
    return ((delta @ gram) * delta).sum(1)


def predicted_loss(delta: Tensor, gram: Tensor, fisher: Tensor) -> float:
    """Nats a token at the model's output to second order, channels taken as independent: half the Fisher diagonal (n,) times each
    channel's mean squared error."""
    return float(0.5 * (fisher.double() * output_error(delta, gram).double().clamp(min=0)).sum())
