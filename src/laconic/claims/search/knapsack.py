"""Claims of exact allocation: a level for each matrix against one for all, and against its own levels dealt at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, on, run
from laconic.claims.search.uniform import RECIPE, allocation, one_for_all
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.menu import Budget, Menu, Plan, Row, plan_of
from laconic.methods.search.allocate.knapsack import Knapsack
from laconic.pipeline import price, quiet

Spoil = Callable[[Menu, int], Menu]


class Forgetful:
    """A journal that keeps nothing: pricing is not resumed here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def done(self, key: str) -> dict[str, Any] | None:
        """Nothing ever is."""
        return None

    def finish(self, key: str, value: Any, tensors: Any = None) -> None:
        """Not kept."""


def priced(bench: Bench, scratch: Path, seed: int) -> Menu:
    """The price list from calibration rows of a seed, damages in nats a token at the output."""

    def make() -> Menu:
        rows, _ = price(bench.source, bench.drawn(seed), RECIPE, seed=seed, work=Forgetful(scratch), progress=quiet, batch=bench.batch)
        return Menu(tuple(rows))

    found: Menu = bench.once(("menu", seed), make)
    return found


def kept(menu: Menu, seed: int) -> Menu:
    """The menu as it is."""
    return menu


def shuffled(menu: Menu, seed: int) -> Menu:
    """The stand-in: the damages of each site belong to another one."""
    by_site: dict[str, list[Row]] = {}
    for row in menu.rows:
        by_site.setdefault(row.site, []).append(row)
    names = list(by_site)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return Menu(
        tuple(
            row._replace(damage=other.damage)
            for name, at in zip(names, order, strict=True)
            for row, other in zip(by_site[name], by_site[names[at]], strict=True)
        )
    )


def reversed_ranks(menu: Menu, seed: int) -> Menu:
    """The stand-in: the site that suffers most takes the damages of the one that suffers least, and so on."""
    by_site: dict[str, list[Row]] = {}
    for row in menu.rows:
        by_site.setdefault(row.site, []).append(row)
    names = sorted(by_site, key=lambda name: sum(row.damage.value for row in by_site[name]))
    pairs = zip(names, reversed(names), strict=True)
    return Menu(
        tuple(row._replace(damage=other.damage) for name, twin in pairs for row, other in zip(by_site[name], by_site[twin], strict=True))
    )


def dealt(menu: Menu, plan: Plan, seed: int) -> Plan:
    """The plan's own levels, dealt at random among the matrices of one shape: the same bytes, and nowhere more extreme levels."""
    generator = torch.Generator().manual_seed(seed)
    by_site: dict[str, list[Row]] = {}
    for row in menu.rows:
        by_site.setdefault(row.site, []).append(row)
    chosen = {row.site: row for row in plan.rows}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, rows in by_site.items():
        by_shape.setdefault(tuple(row.cost.bytes for row in rows), []).append(name)
    found = []
    for names in by_shape.values():
        order = torch.randperm(len(names), generator=generator).tolist()
        for name, at in zip(names, order, strict=True):
            found.append(next(row for row in by_site[name] if row.level == chosen[names[at]].level))
    return plan_of(menu, found)


def _solved(bench: Bench, lab: Lab, spoil: Spoil, budget: int, seed: int) -> Plan:
    menu = spoil(priced(bench, lab.scratch, seed), seed)
    return Knapsack()(menu, Budget(budget), judge=None, rng=torch.Generator(), log=lab.log)


def measured(bench: Bench, plan: Plan) -> Found:
    """A plan at the output; equal plans are measured once."""
    key = tuple(sorted((row.site, *row.level.items()) for row in plan.rows))
    found: Found = bench.once(key, partial(run, bench, allocation(plan)))
    return found


@gathered
def _against(bench: Bench, lab: Lab, rival: str, spoil: Spoil, seeds: Sequence[int]) -> Iterator[Duel]:
    for bits in (4, 3):
        uniform = one_for_all(bench, bits)
        budget = uniform.bytes
        ours = [measured(bench, _solved(bench, lab, spoil, budget, seed)) for seed in seeds]
        if rival == "uniform":
            theirs = [measured(bench, uniform)]
        else:
            menus = [priced(bench, lab.scratch, seed) for seed in seeds]
            theirs = [
                measured(bench, dealt(menu, _solved(bench, lab, kept, budget, seed), seed)) for menu, seed in zip(menus, seeds, strict=True)
            ]
        yield duel(f"bytes of uniform {bits} bits", ours, theirs, names=("knapsack", rival))


def _on(name: str, rival: str, spoil: Spoil, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _against(bench, lab, rival, spoil, lab.draws(seeds)))


PAPER = Paper("Yao et al.", 2021, "arXiv:2011.10680", "section 3.4")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At equal bytes, levels from the integer program lose less KL and perplexity than one level for all.",
        where=PAPER,
        scale="nano, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 4 and 3 bits, 3 draws of the "
        "rows for pricing",
        check=partial(_on, "nano", "uniform", kept, SEEDS),
        broken=partial(_on, "nano", "uniform", shuffled, ONE),
    ),
    Claim(
        says="At equal bytes, levels from the integer program lose less KL and perplexity than the same levels dealt at random.",
        where=PAPER,
        scale="nano, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 4 and 3 bits, 3 draws of the "
        "rows for pricing, each with its levels dealt at random among matrices of one shape",
        check=partial(_on, "nano", "random", kept, SEEDS),
        broken=partial(_on, "nano", "random", reversed_ranks, ONE),
    ),
)
