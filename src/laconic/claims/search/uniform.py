"""Claims of uniform allocation: a finer level for all is a better model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from laconic.claims.lab import Bench, Choose, judged, on, run
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.menu import Budget, Judge, Menu, Plan, Row, Search, plan_of, silent
from laconic.core.site import Site
from laconic.core.transform import Level, Transform
from laconic.methods.search.allocate.uniform import Uniform, by_level
from laconic.pipeline import price, quiet
from laconic.recipe import Choice, Recipe, build, level_of

RECIPE = Recipe(
    name="levels of round to nearest",
    choices=(Choice(method="quantize.round.rtn", levels=tuple({"bits": bits, "group": 64} for bits in (2, 3, 4, 5, 6, 8))),),
)


@dataclass(frozen=True)
class Coarsest(Search):
    """The stand-in: the cheapest level that fits."""

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
        return plan_of(menu, min(by_level(menu).values(), key=lambda rows: sum(row.cost.bytes for row in rows)))


def allocation(plan: Plan) -> Choose:
    """Each site's method and level, as the plan bought them."""
    chosen: dict[str, Row] = {row.site: row for row in plan.rows}

    def choose(site: Site) -> tuple[Transform, Level] | None:
        if site.name not in chosen:
            return None
        transform = build(chosen[site.name].method)
        return transform, level_of(transform, chosen[site.name].level)

    return choose


def bare(bench: Bench) -> Menu:
    """All rows by bytes alone."""
    rows, _ = price(bench.source, None, RECIPE, seed=0, work=None, progress=quiet, batch=bench.batch)
    return Menu(tuple(rows))


def one_for_all(bench: Bench, bits: int) -> Plan:
    """The plan of one level, embedding included."""
    menu = bare(bench)
    return plan_of(menu, [row for row in menu.rows if row.level["bits"] == bits])


def _finer(bench: Bench, search: Search, bits: Sequence[int]) -> Verdict:
    """Budgets of one level after another, each spent by the search: KL falls each time."""
    menu = bare(bench)
    numbers: dict[str, Measurement] = {}
    found = []
    n = bench.certify.inputs.shape[0]
    for one in bits:
        budget = one_for_all(bench, one).bytes
        plan = search(menu, Budget(budget), judge=None, rng=torch.Generator(), log=lambda _: None)
        result = run(bench, allocation(plan))
        found.append(result)
        numbers[f"bytes of {one} bits: KL"] = Measurement(result.kl, "nats/token", n)
        numbers[f"bytes of {one} bits: perplexity gap"] = Measurement(result.gap, "share", n)
        numbers[f"bytes of {one} bits: bytes"] = Measurement(float(result.bytes), "bytes", 1)
    wrong = [
        f"the budget of {finer} bits gives no lower KL than that of {coarser} bits"
        for coarser, finer, a, b in zip(bits, bits[1:], found, found[1:], strict=False)
        if b.kl >= a.kl
    ]
    return judged(wrong, numbers)


def _on(name: str, search: Search, lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _finer(bench, search, (2, 3, 4, 6, 8) if lab.quick else (2, 3, 4, 5, 6, 8)))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="The more bytes one level for all may cost, the lower its KL, at each step from 2 to 8 bits.",
        where=Paper("Frantar et al.", 2023, "arXiv:2210.17323", "section 4"),
        scale="nano, embedding included, round to nearest in groups of 64; no chance in it",
        check=partial(_on, "nano", Uniform()),
        broken=partial(_on, "nano", Coarsest()),
    ),
)
