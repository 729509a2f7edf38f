"""Money: what each choice costs and what it damages, a budget, and the search that buys an exact cover within it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from laconic.core.errors import UserError
from laconic.core.transform import Objective


class Cost(NamedTuple):
    """Counted from the Change, never from the nominal level. bytes: once for each stored tensor, or of a document's text. examples:
    how many of a pool are taken."""

    bytes: int
    flops: float = 0.0
    kv_bytes_per_token: float = 0.0
    seconds: float = 0.0
    examples: int = 0


class Damage(NamedTuple):
    """How much is lost. `where` says at which place and how it was found; only damages of one `where` may be added."""

    value: float
    unit: str
    where: str


class Row(NamedTuple):
    """One choice: it settles the tensors it covers (`parameters` weights in all) with `method` at `level`. `requires` and `excludes`
    name other rows by index."""

    covers: frozenset[str]
    method: str
    level: Mapping[str, Any]
    cost: Cost
    damage: Damage
    site: str = ""
    parameters: int = 0
    requires: tuple[int, ...] = ()
    excludes: tuple[int, ...] = ()


class Menu(NamedTuple):
    """All rows, and the bytes of what no row covers (one-dimensional tensors, kept as they are)."""

    rows: tuple[Row, ...]
    fixed: int = 0

    def tensors(self) -> frozenset[str]:
        """Every tensor that some row covers."""
        return frozenset(name for row in self.rows for name in row.covers)


class Budget(NamedTuple):
    """Upper bounds; None is no bound. bytes: of the whole stored model, `Menu.fixed` included."""

    bytes: int | None = None
    examples: int | None = None

    def allows(self, cost: Cost) -> bool:
        """Whether a sum of costs lies within all bounds."""
        return (self.bytes is None or cost.bytes <= self.bytes) and (self.examples is None or cost.examples <= self.examples)


def spent(menu: Menu, rows: Iterable[Row]) -> Cost:
    """What rows of a menu cost together, in what a budget bounds; `Menu.fixed` included."""
    chosen = list(rows)
    return Cost(menu.fixed + sum(row.cost.bytes for row in chosen), examples=sum(row.cost.examples for row in chosen))


class Plan(NamedTuple):
    """The rows bought, in the order of the menu, with their sums."""

    rows: tuple[Row, ...]
    bytes: int
    damage: Damage


def total(rows: Sequence[Row]) -> Damage:
    """The sum of damages; refused where they are unlike, because a sum of numbers from different places ranks plans wrongly."""
    kinds = {(row.damage.unit, row.damage.where) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"damages found in different ways cannot be added: {sorted(kinds)}")
    unit, where = next(iter(kinds)) if kinds else ("", "")
    return Damage(float(sum(row.damage.value for row in rows)), unit, where)


def plan_of(menu: Menu, rows: Sequence[Row]) -> Plan:
    """A Plan from chosen rows; refused unless they cover every tensor exactly once."""
    seen: set[str] = set()
    for row in rows:
        if seen & row.covers:
            raise ValueError(f"two rows cover {sorted(seen & row.covers)}")
        seen |= row.covers
    if missing := menu.tensors() - seen:
        raise ValueError(f"no row covers {sorted(missing)[:3]}")
    return Plan(tuple(rows), menu.fixed + sum(row.cost.bytes for row in rows), total(rows))


class Judge(ABC):
    """Measures whole plans at the model's output on search data (dear). `rows`: how many pieces that data has; a search that looks at many
    plans looks at few rows of each first."""

    rows: int

    @abstractmethod
    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        """The damage of each plan, over the rows of `part` (all when None). Plans are given together, since those that begin alike share
        the work up to where they differ."""


class Judges(Judge):
    """A Judge for a search that measures in more ways than one."""

    @abstractmethod
    def by(self, objective: Objective) -> Judges:
        """The same that measures something else."""


def silent(done: int, total: int, note: str) -> None:
    """A progress that shows nothing."""


class Search(ABC):
    """Buys an exact cover within the budget. What it does follows from its arguments alone, answers of the judge included, so that a search
    that was cut off can be run again over recorded answers."""

    def asks(self) -> Objective | None:
        """What the judge is to measure; None where the search looks at the menu alone, and then no judge is made."""
        return None

    @abstractmethod
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
        """Raises UserError naming the least possible bytes where nothing fits. progress(done, total, note): a long search says where it
        stands."""


class Measuring(Search):
    """A Search that is given `Judges`, as it measures in more ways than one."""

    @abstractmethod
    def also(self) -> tuple[Objective, ...]:
        """What it measures besides `asks()`. Each is tried on an answer of the model before anything is priced, so that one that is not for
        such answers says so at once."""


def undominated(menu: Menu) -> list[int]:
    """Indices of rows that no other row over the same tensors beats in bytes, examples and damage; rows bound to others always stay."""
    bound = {i for row in menu.rows for i in (*row.requires, *row.excludes)}
    groups: dict[frozenset[str], list[int]] = {}
    for i, row in enumerate(menu.rows):
        groups.setdefault(row.covers, []).append(i)
    kept: list[int] = []
    for members in groups.values():
        best: dict[int, float] = {}
        for i in sorted(members, key=lambda i: (menu.rows[i].cost.bytes, menu.rows[i].damage.value)):
            row = menu.rows[i]
            beaten = min((value for examples, value in best.items() if examples <= row.cost.examples), default=float("inf"))
            if row.damage.value < beaten or i in bound or row.requires or row.excludes:
                kept.append(i)
                best[row.cost.examples] = min(best.get(row.cost.examples, float("inf")), row.damage.value)
    return sorted(kept)


# damages of a model that holds so many parts of each tensor, when one of the names alone gets one part more: one for each name
Trial = Callable[[Mapping[str, int], Sequence[str]], Sequence[Damage]]


class Order(ABC):
    """Puts the parts of what is held in one sequence, every prefix of which is a model: what comes next where there is room for more."""

    @abstractmethod
    def __call__(self, parts: Mapping[str, Sequence[int]], trial: Trial) -> Sequence[str]:
        """parts: the bytes of each part of each tensor; the first part of each is always there. -> names; each time that a name comes, it
        gets its next part, until every part has come."""


def cheapest(menu: Menu) -> int:
    """The least bytes of any cover: what "nearest possible" means in errors. Sets of rows are apart or nested in one another (a sub-layer
    and its matrices); of nested ones the cheaper way counts."""
    direct: dict[frozenset[str], int] = {}
    for row in menu.rows:
        direct[row.covers] = min(direct.get(row.covers, row.cost.bytes), row.cost.bytes)
    least: dict[frozenset[str], int] = {}
    within: dict[str, frozenset[str]] = {}
    for covers, size in sorted(direct.items(), key=lambda item: len(item[0])):
        parts = {within[name] for name in covers if name in within}
        if not all(part <= covers for part in parts):
            raise ValueError(f"rows overlap and are not nested: {sorted(covers)[:3]}")
        whole = sum(len(part) for part in parts) == len(covers)
        cost = sum(least.pop(part) for part in parts)
        least[covers] = min(size, cost) if whole else size
        within.update(dict.fromkeys(covers, covers))
    return menu.fixed + sum(least.values())


def refuse(menu: Menu, budget: Budget) -> UserError:
    """The error for a budget that nothing fits."""
    return UserError(
        f"the budget of {budget.bytes:,} bytes is below what is possible: the least is {cheapest(menu):,} bytes; ask for that or more"
    )
