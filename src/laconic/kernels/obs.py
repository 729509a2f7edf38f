"""The optimal-brain-surgeon solver behind GPTQ, SparseGPT and their kin: settle column by column, push each error onto the columns not yet
settled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from laconic.kernels import levels as tables
from laconic.kernels.grids import Grid, decode, encode, fit_clipped, fit_range
from laconic.kernels.levels import Levels
from laconic.kernels.vectors import Book, Codes, cut, laid, looked_up, nearest_sums, weighing


class Factor(NamedTuple):
    """Upper Cholesky factor (m, m) of the inverse damped Hessian, the columns that no token ever moved, and the damping that was needed."""

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Factor:
    """gram (m, m), mean of x xT, may be singular, zero or slightly indefinite -> its inverse's upper Cholesky factor, never NaN.

    Dead columns (no input) get a unit diagonal. `damping` is a fraction of the mean diagonal; it is raised tenfold until both
    factorizations succeed. Entries that are not finite are refused."""
    if not _finite(gram):
        raise ValueError("the Gram matrix has entries that are not finite: an activation overflowed, calibrate in float32")
    m = gram.shape[0]
    diagonal = gram.diagonal().to(torch.float64 if m <= 2048 else gram.dtype)
    dead = diagonal <= 0
    some = bool(dead.any())
    scale = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones((), dtype=diagonal.dtype)
    info = torch.empty((), dtype=torch.int32)
    used = damping
    while True:
        # columns lie one after another, as LAPACK wants them: then each step works in place, on the one copy that is held
        held = torch.empty(m, m, dtype=diagonal.dtype).T
        held.copy_(gram)
        if some:
            held[dead, :] = 0
            held[:, dead] = 0
        held.div_(scale)
        held.diagonal()[dead] = 1.0
        held.diagonal().add_(used)
        torch.linalg.cholesky_ex(held, out=(held, info))
        if not int(info):
            torch.cholesky_inverse(held, out=held)
            torch.linalg.cholesky_ex(held, upper=True, out=(held, info))
            if not int(info) and _finite(held):
                return Factor(held.float(), dead, used)
        used = max(used * 10, 1e-6)


def _finite(x: Tensor) -> bool:
    """Whether all entries are, told by the least and the greatest: NaN is both, and nothing of the size of x is made."""
    return x.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(x))


def remarks(name: str, factors: Sequence[Factor], damping: float, fate: str) -> tuple[str, ...]:
    """What a user should know of a site's factors: how many input channels saw no activation and met which `fate`, and a damping that
    had to be raised."""
    found = []
    if dead := sum(int(factor.dead.sum()) for factor in factors):
        found.append(f"{name}: {dead} of {sum(factor.dead.numel() for factor in factors)} input channels saw no activation and {fate}")
    if (used := max(factor.damping for factor in factors)) > damping:
        found.append(f"{name}: the Hessian is singular; damping was raised from {damping:g} to {used:g}")
    return tuple(found)


class Window(NamedTuple):
    """Columns `start` to `stop` of a sweep at work. inside (stop - start, rows): the weights as they stand, columns as rows so that each
    step works on contiguous memory. errors, of the same shape: what the settled columns have pushed on inside, and not yet beyond.
    work (rows, m) and upper (m, m) are those of the sweep."""

    start: int
    stop: int
    inside: Tensor
    errors: Tensor
    work: Tensor
    upper: Tensor

    def ahead(self, i: int, rows: slice | Tensor, end: int) -> Tensor:
        """The weights of some rows from the window's i-th column up to column `end` as they stand, all errors so far included."""
        here = self.inside[i : min(end, self.stop) - self.start, rows].T
        if end > self.stop:
            # columns beyond the window have not had its earlier errors yet
            pushed = self.errors[:i, rows].T @ self.upper[self.start : self.start + i, self.stop : end]
            here = torch.cat([here, self.work[rows, self.stop : end] - pushed], 1)
        return here


def sweep(work: Tensor, upper: Tensor, settle: Callable[[Window, int], Tensor], *, block: int = 128) -> None:
    """Walks over the columns of work (rows, m), which is written to, with upper (m, m) the Cholesky factor of the inverse Hessian.

    settle(window, i) -> (rows,) decides what the window's i-th column becomes and gives its weights minus that; the error is pushed onto
    the columns to its right by row of `upper`: at once within the window of `block` columns, beyond it when the window is done."""
    m = work.shape[1]
    diagonal = upper.diagonal().tolist()
    for start in range(0, m, block):
        stop = min(start + block, m)
        inside = work[:, start:stop].T.contiguous()
        window = Window(start, stop, inside, torch.empty_like(inside), work, upper)
        for i in range(stop - start):
            at = start + i
            error = settle(window, i).div_(diagonal[at])
            window.errors[i] = error
            if i + 1 < stop - start:
                inside[i + 1 :].addr_(upper[at, at + 1 : stop], error, alpha=-1.0)
        if stop < m:
            work[:, stop:].addmm_(window.errors.T, upper[start:stop, stop:], alpha=-1.0)


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
    whole_rows = [grid.row for grid in grids]
    # one row for each (grid, output channel); scale and zero of the column at hand
    work = base[:, visit].repeat(count, 1)
    top = torch.tensor([2.0**grid.bits - 1 for grid in grids]).repeat_interleave(n)
    s_now, z_now = torch.empty(count * n), torch.empty(count * n)
    codes = torch.empty(m, count * n, dtype=torch.uint8)

    def settle(window: Window, i: int) -> Tensor:
        column = columns[window.start + i]
        for level in range(count):
            rows = slice(level * n, (level + 1) * n)
            group, into = divmod(column, widths[level])
            if not fixed and into == 0:
                end = min(column + widths[level], m)
                s, z = fit(window.ahead(i, rows, end), whole_rows[level], slice(column, end))
                scales[level][:, group], zeros[level][:, group] = s[:, 0], z[:, 0]
                s_now[rows], z_now[rows] = s[:, 0], z[:, 0]
            elif fixed:
                s_now[rows], z_now[rows] = scales[level][:, group], zeros[level][:, group]
        w = window.inside[i]
        q = torch.addcdiv(z_now, w, s_now).round_().clamp_(min=0)
        q = torch.minimum(q, top, out=q)
        codes[column] = q
        return torch.addcmul(w, q - z_now, s_now, value=-1.0)

    sweep(work, factor.upper, settle, block=block)
    split = [codes[:, level * n : (level + 1) * n].T.contiguous() for level in range(count)]
    return [Rounded(*found) for found in zip(split, scales, zeros, strict=True)]


def round_within_columns(weight: Tensor, factor: Factor, grid: Grid, *, block: int = 128) -> Rounded:
    """As `round_columns`, with groups that run down a column, along the outputs of one input channel: weight (n, m) -> codes (m, n) uint8,
    scale and zero (m, g), of the transposed matrix. A column is fitted when the walk reaches it, from weights that carry the errors so
    far."""
    n, m = weight.shape
    codes = torch.empty(m, n, dtype=torch.uint8)
    scale, zero = torch.empty(m, grid.count(n)), torch.empty(m, grid.count(n))

    def settle(window: Window, i: int) -> Tensor:
        at, column = window.start + i, window.inside[i][None]
        s, z = fit_range(column, grid)
        code = encode(column, s, z, grid)
        codes[at], scale[at], zero[at] = code[0], s[0], z[0]
        return column[0] - decode(code, s, z, grid)[0]

    sweep(weight.float().clone(), factor.upper, settle, block=block)
    return Rounded(codes, scale, zero)


def round_columns_to(
    weight: Tensor,
    factor: Factor,
    levels: Levels,
    table: Tensor | None,
    whole: Tensor | None,
    *,
    importance: Tensor | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Rounds weight (n, m) column by column with error compensation to the values of a table (None: the format's own) -> codes (n, m)
    uint8, scale (n, g) fp32 as stored beside `whole`. Each group's scale is fitted when the walk reaches it, from weights that carry the
    errors so far; importance (m,): then for least error under it."""
    n, m = weight.shape
    width = levels.width(m)
    names, rising, bounds = tables.ranked(levels, table)
    scale, codes = torch.empty(levels.count(m), n), torch.empty(m, n, dtype=torch.uint8)

    def settle(window: Window, i: int) -> Tensor:
        column = window.start + i
        group, into = divmod(column, width)
        if into == 0:
            end = min(column + width, m)
            ahead = window.ahead(i, slice(None), end)
            if importance is None:
                scale[group] = tables.fit_scale(ahead, levels.row, whole)[:, 0]
            else:
                scale[group] = tables.fit_clipped(ahead, levels.row, table, whole, importance=importance[column:end])[:, 0]
        w, s = window.inside[i], scale[group]
        rank = torch.bucketize(w / torch.where(s > 0, s, torch.inf), bounds)
        codes[column] = names[rank]
        return w - rising[rank] * s

    sweep(weight.float().clone(), factor.upper, settle, block=block)
    return codes.T.contiguous(), scale.T.contiguous()


def round_vectors(
    weight: Tensor, factor: Factor, books: Sequence[Book], order: Tensor, *, scale: Tensor | None = None, block: int = 128
) -> list[Codes]:
    """Rounds weight (n, m) column by column with error compensation, in `order` (m,), each column to the entries of its book's tables that
    are nearest to its vectors -> indices for each book. All numbers of a vector have the same inputs, so that nearest means least error.
    scale (n,): a factor of each row beside the tables."""
    n = weight.shape[0]
    rows = torch.ones(n) if scale is None else scale.clamp(min=2.0**-126)
    weighed = [weighing(n, book.width, scale) if scale is not None or n % book.width else None for book in books]
    codes = [[torch.empty(-(-n // book.width), len(book.columns), dtype=torch.int64) for _ in book.tables] for book in books]
    place = {int(column): (which, at) for which, book in enumerate(books) for at, column in enumerate(book.columns.tolist())}
    columns = order.tolist()

    def settle(window: Window, i: int) -> Tensor:
        which, at = place[columns[window.start + i]]
        book, w = books[which], window.inside[i]
        found = nearest_sums(cut((w / rows)[:, None], book.width)[:, 0], book.tables, weighed[which])
        for one, code in zip(codes[which], found, strict=True):
            one[:, at] = code
        return w - laid(looked_up(found, book.tables)[:, None], n)[:, 0] * rows

    sweep(weight.float()[:, order], factor.upper, settle, block=block)
    return codes


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


def removal_cost(weight: Tensor, gram: Tensor, damping: float = 0.01) -> Tensor:
    """weight (n, m), gram (m, m) or (g, m, m) of n / g rows each -> (n, m) what removing each weight alone would add to the mean squared
    output error once the rest of its row makes up for it: w^2 / [H^-1]_jj.  Zero for dead channels."""
    step = weight.shape[0] // (gram.shape[0] if gram.dim() == 3 else 1)
    found = []
    for rows, one in zip(weight.float().split(step), gram if gram.dim() == 3 else gram[None], strict=True):
        factor = inverse_factor(one, damping)
        alive = one.diagonal()[~factor.dead]
        scale = alive.mean() if alive.numel() else torch.zeros(())
        # H^-1 is upper^T upper, of a Hessian divided by its scale
        found.append((rows.square() * (scale / factor.upper.square().sum(0))).masked_fill(factor.dead, 0.0))
    return torch.cat(found)


def without_columns(weight: Tensor, gram: Tensor, gone: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """weight (n, m), gram (m, m), gone (m,) bool -> weight with those columns zero and the others moved so that the output errs least,
    and the damping that was needed: with G gone and K kept, w_K - w_G ([H^-1]_GG)^-1 [H^-1]_GK = w_K + w_G H_GK (H_KK)^-1."""
    if not _finite(gram):
        raise ValueError("the Gram matrix has entries that are not finite: an activation overflowed, calibrate in float32")
    out = weight.float().clone()
    out[:, gone] = 0.0
    if not bool(gone.any()) or bool(gone.all()):
        return out, damping
    kept = ~gone
    hessian = gram.double() if gram.shape[0] <= 2048 else gram
    inner = hessian[kept][:, kept]
    scale = inner.diagonal().clamp(min=0).mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    used = damping
    while True:
        damped = inner / scale
        damped.diagonal().add_(used)
        lower, bad = torch.linalg.cholesky_ex(damped)
        if not int(bad):
            # (K, G): how much of each removed column each kept one takes over
            share = torch.cholesky_solve(hessian[kept][:, gone] / scale, lower)
            if bool(torch.isfinite(share).all()):
                out[:, kept] += weight.float()[:, gone] @ share.T.float()
                return out, used
        used = max(used * 10, 1e-6)
