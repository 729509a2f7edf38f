"""MixDQ's bits: what a layer does to an image's content and to its quality is measured apart, and bought apart.

Zhao et al. 2024, arXiv:2405.17873, sections 4.2 and 4.3. Layers fall into two groups: content (cross-attention and feed-forward) and
quality (all others, self-attention and convolutions). One at a time, at each of its levels and all else at its finest, a layer of the first
is scored by the SSIM of the answer, one of the second by its signal to quantization noise ratio in decibels. Inside each group
max sum_i score_i(level_i)  s.t.  bytes of the group <= its share,
an integer program; the groups' average bits stand as k to 1, k over `ratios` where both can be paid, and of all k the plan of least KL on
the search data is taken (the paper looks at images). What content leaves unspent is quality's. Answers are log-densities of square images
(`kernels.densities`), as a generator of few steps gives them. menu, budget, judge -> plan; it ends no worse than what `start` buys.
Raises UserError where nothing fits. Sibling: search.allocate.knapsack (one damage for all)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from laconic.core.claim import Card, Paper
from laconic.core.errors import UserError
from laconic.core.menu import Budget, Judge, Judges, Measuring, Menu, Plan, Row, Search, cheapest, plan_of, refuse, silent
from laconic.core.transform import Objective
from laconic.kernels.losses import Dissimilarity, Divergence, NoiseToSignal

CARD = Card(Paper("Zhao et al.", 2024, "arXiv:2405.17873", "sections 4.2 and 4.3"), catalogue="mixdq", sibling="search.allocate.knapsack")

Units = Mapping[frozenset[str], Sequence[Row]]


def units_of(menu: Menu) -> dict[frozenset[str], list[Row]]:
    """Rows by what they cover, finest first: most bytes, of as many the least damage. Refused where they overlap or are bound."""
    units: dict[frozenset[str], list[Row]] = {}
    for row in menu.rows:
        units.setdefault(row.covers, []).append(row)
    bound = any(row.requires or row.excludes for row in menu.rows)
    if bound or sum(map(len, units)) > len(menu.tensors()):
        raise UserError(
            "mixdq changes one matrix at a time, and rows of this menu overlap or are bound to others; use search.allocate.knapsack"
        )
    return {covers: sorted(rows, key=lambda row: (-row.cost.bytes, row.damage.value)) for covers, rows in units.items()}


def key_of(row: Row) -> tuple[frozenset[str], str, str]:
    """What tells a row of a menu from the others."""
    return row.covers, row.method, json.dumps(dict(row.level), sort_keys=True)


def split_at(room: int, weights: tuple[int, int], ratio: float) -> int:
    """Bytes of the first of two groups of so many weights, whose average bits stand as `ratio` to 1."""
    first, second = ratio * weights[0], weights[1]
    return int(room * first / (first + second))


@dataclass(frozen=True)
class MixDQ(Measuring):
    """start: its plan is looked at too, search.allocate.uniform in the paper's tables. solve: buys inside a group. content: a regular
    expression that finds the names of content layers. ratios: average bits of content over those of quality, from, to, and how many are
    tried, the paper's for weights."""

    start: Search
    solve: Search
    content: str = r"attn2|cross|(^|\.)(ff|mlp|ffn|feed_forward|up|down|fc1|fc2)(\.|$)"
    ratios: tuple[float, float, int] = (0.46, 1.36, 10)

    def __post_init__(self) -> None:
        low, high, count = self.ratios
        if not 0 < low <= high or count < 1:
            raise ValueError(f"ratios={self.ratios}: from, to and how many, all above 0")
        try:
            re.compile(self.content)
        except re.error as error:
            raise ValueError(f"content={self.content!r} is no regular expression ({error})") from None

    def asks(self) -> Objective | None:
        return Divergence()

    def also(self) -> tuple[Objective, ...]:
        return Dissimilarity(), NoiseToSignal()

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
        if not isinstance(judge, Judges):
            raise ValueError("mixdq measures plans in two ways: it needs a judge that can")
        room = menu.fixed + sum(row.cost.bytes for row in menu.rows) if budget.bytes is None else budget.bytes
        if room < cheapest(menu):
            raise refuse(menu, budget)
        units = units_of(menu)
        groups: tuple[dict[frozenset[str], Sequence[Row]], ...] = ({}, {})
        for covers, rows in units.items():
            groups[0 if re.search(self.content, rows[0].site or min(covers)) else 1][covers] = rows
        log(f"{len(groups[0])} matrices are content, {len(groups[1])} quality")
        finest = {covers: rows[0] for covers, rows in units.items()}
        scored: list[Menu] = []
        for number, (group, objective) in enumerate(zip(groups, self.also(), strict=True)):
            progress(number, 3, f"one matrix at a time: {objective.name}")
            scored.append(self._scored(menu, group, finest, judge.by(objective)) if group else Menu(()))
        plans = self._bought(menu, room, scored, rng)
        with contextlib.suppress(UserError):
            plans.append((self.start(menu, budget, judge=None, rng=rng, log=lambda _: None), "as it began"))
        progress(2, 3, f"{len(plans)} plans")
        found = [damage.value for damage in judge([plan for plan, _ in plans])]
        best = min(range(len(found)), key=lambda i: found[i])
        plan, words = plans[best]
        log(f"of {len(plans)} plans the best is {words}: KL {found[best]:.4g}")
        progress(3, 3, f"KL {found[best]:.4g}")
        return plan

    @staticmethod
    def _scored(menu: Menu, group: Units, finest: Mapping[frozenset[str], Row], judge: Judge) -> Menu:
        """The rows of a group, each with what it alone does to the model in place of its damage, from 0 on."""
        rows = [row for own in group.values() for row in own]
        measured = judge([plan_of(menu, [*({**finest, row.covers: row}).values()]) for row in rows])
        least = min(damage.value for damage in measured)
        return Menu(
            tuple(row._replace(damage=damage._replace(value=damage.value - least)) for row, damage in zip(rows, measured, strict=True))
        )

    def _bought(self, menu: Menu, room: int, scored: Sequence[Menu], rng: torch.Generator) -> list[tuple[Plan, str]]:
        """Plans of so many bytes, each once and with the ratio that it is of in words."""
        original = {key_of(row): row for row in menu.rows}
        # what a group has at its finest stands for its weights
        weights = [sum({row.covers: row.cost.bytes for row in reversed(group.rows)}.values()) for group in scored]
        least = [cheapest(group) for group in scored]
        room -= menu.fixed
        plans: list[tuple[Plan, str]] = []
        for ratio in torch.linspace(*self.ratios, dtype=torch.float64).tolist():
            share = min(max(split_at(room, (weights[0], weights[1]), ratio), least[0]), room - least[1])
            content = self._spend(scored[0], share, rng)
            quality = self._spend(scored[1], room - sum(row.cost.bytes for row in content), rng)
            rows = [original[key_of(row)] for row in (*content, *quality)]
            plan = plan_of(menu, sorted(rows, key=menu.rows.index))
            if all(plan != other for other, _ in plans):
                plans.append((plan, f"content at {ratio:.2f} times the bits of quality"))
        return plans

    def _spend(self, scored: Menu, size: int, rng: torch.Generator) -> tuple[Row, ...]:
        return self.solve(scored, Budget(size), judge=None, rng=rng, log=lambda _: None).rows if scored.rows else ()
