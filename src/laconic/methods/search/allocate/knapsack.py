"""Knapsack: the cover of least summed damage within the budget, solved exactly as a multiple-choice knapsack.

Bit allocation as an integer program follows Yao et al. 2021 (HAWQ-V3), arXiv:2011.10680, section 3.4, eq. 11:
min sum_i damage_i  s.t.  each tensor settled by exactly one chosen row, sum_i bytes_i <= budget.
menu, budget -> plan; damages in one unit from one place (nats a token at the output).  Solver: HiGHS, relative gap 0.
Raises UserError naming the least possible bytes.  Sibling: search.allocate.uniform (one level for all)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from laconic.core.claim import Card, Paper
from laconic.core.menu import Budget, Judge, Menu, Plan, Row, Search, plan_of, refuse, silent, spent, total, undominated

CARD = Card(Paper("Yao et al.", 2021, "arXiv:2011.10680", "section 3.4"), catalogue="", sibling="search.allocate.uniform")


@dataclass(frozen=True)
class Knapsack(Search):
    """nodes: limit of the solver's search tree (a count, not a time, so that a busy machine buys the same plan); where it is reached the
    remaining gap is logged."""

    nodes: int = 50_000

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
        import highspy

        total(menu.rows)
        index = undominated(menu)
        rows: list[Row] = [menu.rows[i] for i in index]
        place = {original: new for new, original in enumerate(index)}
        # damages span many orders; in units of the typical one the solver's tolerances mean the same on every model
        unit = sorted(row.damage.value for row in rows)[len(rows) // 2] or 1.0
        solver = highspy.Highs()
        solver.silent()
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_abs_gap", 1e-9)
        solver.setOptionValue("mip_max_nodes", self.nodes)
        solver.setOptionValue("threads", 1)
        buy = [solver.addBinary(obj=row.damage.value / unit) for row in rows]
        by_tensor: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            for name in row.covers:
                by_tensor.setdefault(name, []).append(i)
        for choices in {tuple(v) for v in by_tensor.values()}:
            solver.addConstr(sum(buy[i] for i in choices) == 1)
        if budget.bytes is not None:
            # in KiB, so that coefficients stay near the others'
            solver.addConstr(sum(buy[i] * (row.cost.bytes / 1024) for i, row in enumerate(rows)) <= (budget.bytes - menu.fixed) / 1024)
        if budget.examples is not None:
            solver.addConstr(sum(buy[i] for i, row in enumerate(rows) for _ in range(row.cost.examples)) <= budget.examples)
        for i, row in enumerate(rows):
            for other in row.requires:
                solver.addConstr(buy[i] - buy[place[other]] <= 0)
            for other in row.excludes:
                solver.addConstr(buy[i] + buy[place[other]] <= 1)
        solver.minimize()
        status = solver.getModelStatus()
        solution = solver.getSolution().col_value
        if status == highspy.HighsModelStatus.kSolutionLimit and solution:
            log(f"the solver stopped after {self.nodes} nodes with a gap of {solver.getInfo().mip_gap:.2%}")
        elif status != highspy.HighsModelStatus.kOptimal:
            raise refuse(menu, budget)
        plan = plan_of(menu, [row for row, value in zip(rows, solution, strict=True) if value > 0.5])
        if not budget.allows(spent(menu, plan.rows)):
            raise ValueError(f"the solver's plan has {plan.bytes} bytes, the budget is {budget}")
        return plan
