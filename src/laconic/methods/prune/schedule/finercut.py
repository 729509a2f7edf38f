"""FinerCut: the sub-layer whose loss moves the model's output least goes, round by round. Zhang et al. 2024, arXiv:2405.18218, section 3.

Candidates are all attention and all feed-forward sub-layers, each on its own. A round runs the model without each of those left, on top of
what is gone already, and takes out  argmin_s D(original, without gone + {s})  until the plan fits the budget. D is the Jensen-Shannon
divergence of the next-token distributions, or the angle or distance of the logits. No tuning, and no error is ever added to another.
O(L^2) forward passes on few rows; what comes before the first layer that differs is run once a round.
menu, budget, judge -> plan. Of a menu of several levels a candidate is one unit at the next cheaper one. Raises UserError naming the least
possible bytes. Sibling: search.evolve.evopress (mutates whole plans)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from laconic.core.claim import Card, Paper
from laconic.core.menu import Budget, Judge, Menu, Plan, Row, Search, cheapest, plan_of, refuse, silent
from laconic.core.transform import Objective
from laconic.kernels.losses import Angular, Euclidean, JensenShannon

CARD = Card(Paper("Zhang et al.", 2024, "arXiv:2405.18218", "section 3"), catalogue="finercut", sibling="search.evolve.evopress")

DISTANCES: dict[str, Objective] = {"js": JensenShannon(), "angular": Angular(), "euclidean": Euclidean()}


def dearest(menu: Menu) -> tuple[Row, ...]:
    """The cover that begins: of the smallest sets of tensors the dearest rows, so that nothing is gone."""
    found: dict[frozenset[str], Row] = {}
    taken: set[str] = set()
    for row in sorted(menu.rows, key=lambda row: (len(row.covers), -row.cost.bytes)):
        if not row.covers & taken:
            found[row.covers] = row
            taken |= row.covers
    return tuple(found.values())


def cuts(menu: Menu, held: Sequence[Row]) -> list[tuple[Row, ...]]:
    """What may go in one round: covers with one set of tensors at the next cheaper row; rows that lie within the set give way to it."""
    at = {name: row for row in held for name in row.covers}
    below: dict[frozenset[str], Row] = {}
    for row in menu.rows:
        now = {at[name].covers: at[name] for name in row.covers}
        bytes = sum(old.cost.bytes for old in now.values())
        nearer = row.covers not in below or row.cost.bytes > below[row.covers].cost.bytes
        if row.cost.bytes < bytes and all(covers <= row.covers for covers in now) and nearer:
            below[row.covers] = row
    return [(*(old for old in held if not old.covers & row.covers), row) for row in below.values()]


@dataclass(frozen=True)
class FinerCut(Search):
    """distance: what is measured at the output. rows: of the search data (of text 512 tokens each), the same in every round."""

    distance: Literal["js", "angular", "euclidean"] = "js"
    rows: int = 8

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise ValueError(f"distance={self.distance!r} is none of {', '.join(DISTANCES)}")
        if self.rows < 1:
            raise ValueError(f"rows={self.rows} must be 1 or more")

    def asks(self) -> Objective | None:
        return DISTANCES[self.distance]

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
        if judge is None:
            raise ValueError("finercut measures plans: it needs a judge")
        least = cheapest(menu)
        if budget.bytes is not None and least > budget.bytes:
            raise refuse(menu, budget)
        part = torch.randperm(judge.rows, generator=rng)[: self.rows].sort().values.tolist()
        plan = plan_of(menu, dearest(menu))
        most = plan.bytes
        while budget.bytes is not None and plan.bytes > budget.bytes:
            choices = [plan_of(menu, rows) for rows in cuts(menu, plan.rows)]
            found = judge(choices, part)
            best = min(range(len(choices)), key=lambda i: found[i].value)
            plan, said = choices[best], f"{found[best].value:.4g} {found[best].unit}"
            gone = plan.rows[-1].site
            progress(min(most - plan.bytes, most - budget.bytes), most - budget.bytes, f"{gone}: {said}")
            log(f"{gone} goes: {self.distance} {said} on {len(part)} rows")
        return plan
