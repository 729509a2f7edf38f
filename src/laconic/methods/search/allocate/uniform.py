"""Uniform: one and the same level for every matrix, the finest that fits the budget; the plan every other plan is compared with.

Levels are ranked by bits first, then by smaller groups (what quantization papers call W4 g128); no damage is looked at.
The setting of every uniform row in Frantar et al. 2023, arXiv:2210.17323, section 4.  menu, budget -> plan.
Sibling: search.allocate.knapsack (a level for each)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from laconic.core.claim import Card, Paper
from laconic.core.menu import Budget, Judge, Menu, Plan, Row, Search, plan_of, refuse, silent, spent

CARD = Card(Paper("Frantar et al.", 2023, "arXiv:2210.17323", "section 4"), catalogue="", sibling="search.allocate.knapsack")


def by_level(menu: Menu) -> dict[str, list[Row]]:
    """Rows by (method, level), those only that cover every tensor of the menu. Where no method does, methods that share the tensors out
    between them count as one."""
    everything = menu.tensors()

    def by(key: Callable[[Row], str]) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in menu.rows:
            found.setdefault(key(row), []).append(row)
        return {key: rows for key, rows in found.items() if frozenset(name for row in rows for name in row.covers) == everything}

    if alone := by(lambda row: row.method + json.dumps(row.level, sort_keys=True)):
        return alone
    shared = by(lambda row: json.dumps(row.level, sort_keys=True))
    return {key: rows for key, rows in shared.items() if sum(len(row.covers) for row in rows) == len(everything)}


def _fineness(rows: Sequence[Row]) -> tuple[float, float, int]:
    """Bits a weight (of a sparse level: of those that stay, times their share), small groups, bytes."""
    level = rows[0].level
    inner = level.get("first") or level.get("grid") or level.get("weight") or level
    bits = float(inner.get("bits", 16)) * float(level.get("keep", 1.0))
    group = inner.get("group")
    return bits, -float(group if group is not None else 1e9), sum(row.cost.bytes for row in rows)


@dataclass(frozen=True)
class Uniform(Search):
    """The finest single level that fits."""

    def __call__(
        self,
        menu: Menu,
        budget: Budget,
        *,
        judge: Judge | None,
        rng: torch.Generator,
        log: Callable[[str], None],
        progress: Callable[[int, int, str], None] = silent,
    ) -> Plan:
        fits = [rows for rows in by_level(menu).values() if budget.allows(spent(menu, rows))]
        if not fits:
            raise refuse(menu, budget)
        return plan_of(menu, max(fits, key=_fineness))
