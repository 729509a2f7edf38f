"""EvoPress: evolution of whole plans, each judged at the model's output. Sieberling et al. 2024, arXiv:2410.14649, section 3, algorithm 1.

(1 + offspring): a child is its parent after n level switches, n = min(U{1..3}, U{1..3}), mostly 1: a unit goes one level up and others as
many down as that costs. Selection in steps: all children on few rows of the search data, the survivors on more, the last ones with their
parent on the most; the best is the next parent. Fitness is KL(original || plan) in nats a token at the output, so what no sum of layer
errors can say is seen. Costs of units are unlike here (the paper switches between matrices of one size), so a switch pays in stored bytes.
menu, budget, judge -> plan; it begins with what `start` buys, and on all rows of the judge it ends no worse than that.
Raises UserError naming the least possible bytes. Sibling: search.allocate.knapsack (sums of predicted damages, no judge)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from laconic.core.claim import Card, Paper
from laconic.core.errors import UserError
from laconic.core.menu import Budget, Judge, Menu, Plan, Row, Search, cheapest, plan_of, silent, undominated
from laconic.core.transform import Objective
from laconic.kernels.losses import Divergence

CARD = Card(
    Paper("Sieberling et al.", 2024, "arXiv:2410.14649", "section 3, algorithm 1"), catalogue="evopress", sibling="search.allocate.knapsack"
)

# a level of each unit, as a place in its ladder
Levels = tuple[int, ...]
Ladder = tuple[Row, ...]


def ladders(menu: Menu, also: Sequence[Row] = ()) -> tuple[Ladder, ...]:
    """The units and their levels: for each set of tensors its rows from cheap to dear, without those that another beats in both bytes and
    predicted damage, but for `also`. Refused where two sets overlap, since their levels could not be switched one by one."""
    units: dict[frozenset[str], list[Row]] = {}
    kept = set(undominated(menu))
    for i, row in enumerate(menu.rows):
        if i in kept or row in also:
            units.setdefault(row.covers, []).append(row)
    if sum(len(covers) for covers in units) > len(menu.tensors()):
        raise UserError("evopress switches levels of sets of tensors, and sets of this menu overlap; offer each tensor in sets of one kind")
    if any(row.requires or row.excludes for row in menu.rows):
        raise UserError("evopress switches levels freely, and rows of this menu require or exclude others; use search.allocate.knapsack")
    return tuple(tuple(sorted(rows, key=lambda row: row.cost.bytes)) for rows in units.values())


def drawn(among: Sequence[int], rng: torch.Generator) -> int:
    """One of these, each as likely."""
    return among[int(torch.randint(len(among), (1,), generator=rng))]


def step(ladder: Ladder, at: int, by: int) -> int:
    """Bytes that a unit at this level takes more after one step up (by = 1) or gives back after one down (by = -1)."""
    return by * (ladder[at + by].cost.bytes - ladder[at].cost.bytes)


def spent(units: Sequence[Ladder], levels: Levels, room: int, rng: torch.Generator, but: frozenset[int] = frozenset()) -> Levels:
    """Units other than `but` raised, drawn at random, as long as one step of any fits into `room` bytes."""
    at = list(levels)
    while fits := [u for u, own in enumerate(units) if u not in but and at[u] + 1 < len(own) and step(own, at[u], 1) <= room]:
        u = drawn(fits, rng)
        room -= step(units[u], at[u], 1)
        at[u] += 1
    return tuple(at)


def switch(units: Sequence[Ladder], levels: Levels, room: int, rng: torch.Generator) -> Levels:
    """One level switch; `room` bytes are free. A unit is raised; while that is not paid, another is lowered, one that pays the rest alone
    where there is any (of equal cost in the paper; here any that suffices); bytes left over raise further units. Never over budget."""
    at = list(levels)
    up = [u for u, own in enumerate(units) if at[u] + 1 < len(own)]
    if not up:
        return levels
    raised = drawn(up, rng)
    room -= step(units[raised], at[raised], 1)
    at[raised] += 1
    lowered = set()
    while room < 0:
        down = [u for u in range(len(units)) if u != raised and at[u] > 0]
        if not down:
            return levels
        u = drawn([u for u in down if step(units[u], at[u], -1) >= -room] or down, rng)
        room += step(units[u], at[u], -1)
        at[u] -= 1
        lowered.add(u)
    return spent(units, tuple(at), room, rng, but=frozenset(lowered))


class Space(NamedTuple):
    """The plans of a menu, each as a level for every unit, of at most so many bytes (`Menu.fixed` left out)."""

    menu: Menu
    units: tuple[Ladder, ...]
    bytes: int

    def rows(self, levels: Levels) -> list[Row]:
        """The rows that these levels are."""
        return [own[at] for own, at in zip(self.units, levels, strict=True)]

    def plan(self, levels: Levels) -> Plan:
        """The plan that these levels are."""
        return plan_of(self.menu, self.rows(levels))

    def room(self, levels: Levels) -> int:
        """Bytes that are still free."""
        return self.bytes - sum(row.cost.bytes for row in self.rows(levels))

    def mutant(self, levels: Levels, switches: int, rng: torch.Generator) -> Levels:
        """The levels after some switches."""
        for _ in range(switches):
            levels = switch(self.units, levels, self.room(levels), rng)
        return levels


def opening(start: Search, menu: Menu, budget: Budget, rng: torch.Generator, log: Callable[[str], None]) -> tuple[Space, Levels]:
    """All plans within the budget, and the one that `start` buys; the cheapest where it finds none that fits."""
    try:
        bought = start(menu, budget, judge=None, rng=rng, log=log).rows
    except UserError:
        if budget.bytes is not None and cheapest(menu) > budget.bytes:
            raise
        bought = ()
    units = ladders(menu, bought)
    most = sum(own[-1].cost.bytes for own in units) if budget.bytes is None else budget.bytes - menu.fixed
    return Space(menu, units, most), tuple(next((i for i, row in enumerate(own) if row in bought), 0) for own in units)


@dataclass(frozen=True)
class EvoPress(Search):
    """start: buys the first parent: `search.allocate.uniform` in the paper; with `search.allocate.knapsack` it ends no worse than that.
    Where it finds nothing that fits, evolution begins at the cheapest cover. survivors and rows: of each step of selection, rows of the
    search data (of text 512 tokens). switches: the most that one mutation makes. The paper takes 150 generations of 128 for bits, with
    2,048, 16,384 and 131,072 tokens; the defaults are sized for minutes on two cores at 10 M weights."""

    start: Search
    generations: int = 40
    offspring: int = 24
    survivors: tuple[int, ...] = (6, 2, 1)
    rows: tuple[int, ...] = (1, 4, 16)
    switches: int = 3

    def __post_init__(self) -> None:
        if len(self.survivors) != len(self.rows) or not self.rows or self.survivors[-1] != 1:
            raise ValueError(
                f"survivors={self.survivors} and rows={self.rows} must have one number for each step, and the last survivor is one"
            )
        if min(self.generations, self.offspring, self.switches, *self.rows, *self.survivors) < 1:
            raise ValueError("generations, offspring, switches, rows and survivors must be 1 or more")

    def asks(self) -> Objective | None:
        return Divergence()

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
            raise ValueError("evopress measures plans: it needs a judge")
        space, first = opening(self.start, menu, budget, rng, log)
        parent = begun = spent(space.units, first, space.room(first), rng)
        for generation in range(self.generations):
            alive = self._children(space, parent, rng)
            if not alive:
                log("no level can be switched within the budget; the plan stays as it began")
                break
            for number, (survivors, rows) in enumerate(zip(self.survivors, self.rows, strict=True), 1):
                pool = [*alive, parent] if number == len(self.rows) else alive
                part = torch.randperm(judge.rows, generator=rng)[:rows].sort().values.tolist()
                fitness = [damage.value for damage in judge([space.plan(levels) for levels in pool], part)]
                order = sorted(range(len(pool)), key=lambda i: fitness[i])[:survivors]
                alive = [pool[i] for i in order]
            parent = alive[0]
            progress(generation + 1, self.generations, f"KL {min(fitness):.4g} on {len(part)} rows")
        # rows of a generation are a sample: over all of them the search must have gained
        ends = list(dict.fromkeys([parent, begun, first]))
        found = judge([space.plan(levels) for levels in ends])
        best = min(range(len(ends)), key=lambda i: found[i].value)
        log(f"evolution: KL {found[best].value:.4g} on {judge.rows} rows of search data, begun at {found[-1].value:.4g}")
        return space.plan(ends[best])

    def _children(self, space: Space, parent: Levels, rng: torch.Generator) -> list[Levels]:
        """Mutants of the parent, each different; fewer where no more were found."""
        children: dict[Levels, None] = {}
        for _ in range(8 * self.offspring):
            if len(children) == self.offspring:
                break
            switches = int(torch.randint(1, self.switches + 1, (2,), generator=rng).min())
            if (child := space.mutant(parent, switches, rng)) != parent:
                children[child] = None
        return list(children)
