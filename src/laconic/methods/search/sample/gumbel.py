"""Gumbel top-k: a draw without replacement, in which a row's chance follows exp(-damage).

Every row's worth, the damage it spares against the cheapest row over the same things, gets Gumbel(0, 1) noise; rows are taken from
the largest downwards while the budget allows, one for each thing, the rest get the cheapest.  Kool et al. 2019, arXiv:1903.06059,
section 2.3: the order of noisy log weights is that of draws one after another from a softmax over what is left.  menu, budget -> plan.
Raises UserError naming the least possible bytes.  Sibling: search.allocate.knapsack (the best sum, without chance)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from laconic.core.claim import Card, Paper
from laconic.core.menu import Budget, Cost, Judge, Menu, Plan, Row, Search, plan_of, refuse, silent, spent, total

CARD = Card(Paper("Kool et al.", 2019, "arXiv:1903.06059", "section 2.3"), catalogue="", sibling="search.allocate.knapsack")


@dataclass(frozen=True)
class Gumbel(Search):
    """temperature: what damages are divided by before the noise is added; 0 leaves the noise out (plain top-k)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is below 0; 0 is plain top-k, 1 draws by exp(-damage)")

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
        total(menu.rows)
        if any(row.requires or row.excludes for row in menu.rows):
            raise ValueError("rows that are bound to others cannot be drawn one by one; use search.allocate.knapsack")
        least: dict[frozenset[str], Row] = {}
        for row in menu.rows:
            if row.covers not in least or _size(row) < _size(least[row.covers]):
                least[row.covers] = row
        rest = [row for row in menu.rows if row is not least[row.covers]]
        spared = torch.tensor([least[row.covers].damage.value - row.damage.value for row in rest], dtype=torch.float64)
        noise = -torch.empty(len(rest), dtype=torch.float64).exponential_(generator=rng).log()
        worth = spared / self.temperature + noise if self.temperature else spared
        have = spent(menu, least.values())
        if not budget.allows(have):
            raise refuse(menu, budget)
        taken: dict[frozenset[str], Row] = {}
        for i in worth.argsort(descending=True, stable=True).tolist():
            row = rest[i]
            if row.covers in taken:
                continue
            free = least[row.covers].cost
            more = Cost(have.bytes + row.cost.bytes - free.bytes, examples=have.examples + row.cost.examples - free.examples)
            if budget.allows(more):
                taken[row.covers], have = row, more
        chosen = {id(row) for row in {**least, **taken}.values()}
        return plan_of(menu, [row for row in menu.rows if id(row) in chosen])


def _size(row: Row) -> tuple[int, int, float]:
    return row.cost.bytes, row.cost.examples, row.damage.value
