"""Importance: one number for each thing that may go, higher = keep; and keep_top, the one home of every selection rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from laconic.core.errors import UserError
from laconic.core.site import Site
from laconic.core.statistic import Statistic


class Unit(NamedTuple):
    """The things that may go at one site: `weight` in matrix view (n, m) where the things are weights; where they are examples, one row of
    features for each."""

    site: Site
    weight: Tensor


class Score(ABC):
    """Gives each thing of a unit a number; says nothing about how many stay."""

    wants: tuple[Statistic, ...] = ()
    when: Literal["offline", "runtime"] = "offline"

    @abstractmethod
    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        """Score of the shape of the things, higher = keep."""


@dataclass(frozen=True)
class Everywhere:
    """Compare all entries with each other."""


@dataclass(frozen=True)
class PerRow:
    """Compare entries within each row of the last axis."""


@dataclass(frozen=True)
class NofM:
    """Keep `n` in each run of `m` along the last axis; a ragged last run of length r keeps ceil(n * r / m)."""

    n: int
    m: int


@dataclass(frozen=True)
class Across:
    """Compare across axis `axis` jointly with the last axis (heads and tokens, say), with at least `floor` kept in each slice of it."""

    axis: int
    floor: int = 0


Among = Everywhere | PerRow | NofM | Across


def _top(score: Tensor, count: int) -> Tensor:
    """True for the `count` largest of each row of a 2-D score; ties go to the lower index, so the result is a function of the values."""
    order = score.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def _count(keep: float | int, total: int) -> int:
    if isinstance(keep, int) and not isinstance(keep, bool):
        count = keep
    else:
        count = round(keep * total)
    if not 0 <= count <= total:
        raise UserError(f"cannot keep {keep} of {total} things: give a fraction from 0 to 1 or a count up to {total}")
    return count


def keep_top(score: Tensor, keep: float | int, *, among: Among, protect: Tensor | None = None) -> Tensor:
    """Boolean mask of the shape of `score`: true for what stays.

    keep: a fraction (float, 1.0 keeps all) or a count (int) of each compared set; ignored by NofM, which carries its own.
    protect: true where an entry stays whatever its score; it counts against `keep`. NaN scores are refused."""
    if bool(torch.isnan(score).any()):
        raise UserError("a score has NaN entries: the statistics it was made from are damaged, calibrate again")
    work = score.double()
    if protect is not None:
        work = work.masked_fill(protect, torch.inf)
    if isinstance(among, Everywhere):
        flat = work.reshape(1, -1)
        return _top(flat, _count(keep, flat.shape[1])).reshape(score.shape)
    if isinstance(among, PerRow):
        rows = work.reshape(-1, score.shape[-1])
        return _top(rows, _count(keep, rows.shape[1])).reshape(score.shape)
    if isinstance(among, NofM):
        if not 0 < among.n <= among.m:
            raise UserError(f"cannot keep {among.n} of every {among.m}: n must be from 1 to m")
        rows = work.reshape(-1, score.shape[-1])
        whole = rows.shape[1] // among.m * among.m
        mask = torch.empty_like(rows, dtype=torch.bool)
        mask[:, :whole] = _top(rows[:, :whole].reshape(-1, among.m), among.n).reshape(rows.shape[0], whole)
        if whole < rows.shape[1]:
            rest = rows[:, whole:]
            mask[:, whole:] = _top(rest, -(-among.n * rest.shape[1] // among.m))
        return mask.reshape(score.shape)
    moved = work.movedim(among.axis, -2)
    heads, width = moved.shape[-2:]
    flat = moved.reshape(-1, heads, width)
    if among.floor:
        best = _top(flat.reshape(-1, width), min(among.floor, width)).reshape(flat.shape)
        flat = flat.masked_fill(best, torch.inf)
    joint = flat.reshape(-1, heads * width)
    mask = _top(joint, _count(keep, heads * width)).reshape(moved.shape)
    return mask.movedim(-2, among.axis)
