"""Claims of evolution: whole plans measured at the output, against one level for all, sums of predicted damages, and drawing at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Remembering, Reversed, duel, gathered, honest, on, spread
from laconic.claims.search.knapsack import measured
from laconic.claims.search.uniform import RECIPE, one_for_all
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.menu import Budget, Damage, Judge, Menu, Plan
from laconic.kernels.losses import Divergence
from laconic.methods.search.allocate.knapsack import Knapsack
from laconic.methods.search.allocate.uniform import Uniform
from laconic.methods.search.evolve.evopress import EvoPress, drawn, opening, spent
from laconic.pipeline import price, quiet, trials

# tokens of one row: a sample of few tokens is what makes many candidates affordable
ROW = 256


class Counted(Judge):
    """Counts the rows that were run."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.rows, self.run = judge, judge.rows, 0

    def __call__(self, plans: Sequence[Plan], part: Sequence[int] | None = None) -> list[Damage]:
        self.run += len(plans) * (self.rows if part is None else len(part))
        return self.judge(plans, part)


def opened(bench: Bench, scratch: Path, seed: int) -> tuple[Menu, Judge]:
    """The price list from the rows of a seed, and a judge over the same rows."""

    def make() -> tuple[Menu, Judge]:
        work, inputs = Remembering(scratch / f"{bench.name}-{seed}"), bench.drawn(seed)
        rows, _ = price(bench.source, inputs, RECIPE, seed=seed, work=work, progress=quiet, batch=bench.batch, keep=True)
        return Menu(tuple(rows)), trials(bench.source, inputs.reshape(-1, ROW), Divergence(), work)

    found: tuple[Menu, Judge] = bench.once(("opened", seed), make)
    return found


def evolved(bench: Bench, lab: Lab, spoil: Callable[[Judge], Judge], budget: int, seed: int) -> tuple[Plan, int]:
    """What evolution found, and how many rows its judge has run."""

    def make() -> tuple[Plan, int]:
        menu, judge = opened(bench, lab.scratch, seed)
        count = Counted(spoil(judge))
        search = EvoPress(Uniform()) if _whole(bench, lab) else EvoPress(Uniform(), 15, 16, survivors=(4, 1), rows=(1, 12))
        plan = search(menu, Budget(budget), judge=count, rng=torch.Generator().manual_seed(seed), log=lab.log)
        return plan, count.run

    found: tuple[Plan, int] = bench.once(("evolved", spoil, budget, seed), make)
    return found


def guessed(bench: Bench, lab: Lab, budget: int, seed: int) -> Plan:
    """Random search over as many rows: plans at random distances from the uniform one, all on one row, the best quarter of them on four,
    the best quarter of those on twelve."""
    menu, judge = opened(bench, lab.scratch, seed)
    _, run = evolved(bench, lab, honest, budget, seed)
    rng = torch.Generator().manual_seed(seed)
    space, first = opening(Uniform(), menu, Budget(budget), rng, lab.log)
    begun = spent(space.units, first, space.room(first), rng)
    # n * 1 + n / 4 * 4 + n / 16 * 12 rows
    count = round(run / 2.75)
    pool = [space.mutant(begun, drawn(range(1, len(space.units) + 1), rng), rng) for _ in range(count)]
    for rows in (1, 4, 12):
        part = torch.randperm(judge.rows, generator=rng)[:rows].sort().values.tolist()
        plans = [space.plan(levels) for levels in pool]
        found = [damage.value for i in range(0, len(plans), 32) for damage in judge(plans[i : i + 32], part)]
        pool = [pool[i] for i in sorted(range(len(pool)), key=lambda i: found[i])[: math.ceil(len(pool) / 4)]]
    return space.plan(pool[0])


def _whole(bench: Bench, lab: Lab) -> bool:
    """Whether there is time for a search of the default length: a fifth of it is what the larger model has room for."""
    return not lab.quick and bench.name != "nano"


def _rival(bench: Bench, lab: Lab, name: str, budget: int, seed: int) -> Plan:
    if name == "uniform":
        return Uniform()(opened(bench, lab.scratch, seed)[0], Budget(budget), judge=None, rng=torch.Generator(), log=lab.log)
    if name == "sums":
        return Knapsack()(opened(bench, lab.scratch, seed)[0], Budget(budget), judge=None, rng=torch.Generator(), log=lab.log)
    found: Plan = bench.once(("guessed", budget, seed), lambda: guessed(bench, lab, budget, seed))
    return found


@gathered
def _against(bench: Bench, lab: Lab, rival: str, spoil: Callable[[Judge], Judge], seeds: Sequence[int]) -> Iterator[Duel]:
    # of the model that takes minutes, one draw is what a quick check has room for
    seeds = seeds[:1] if lab.quick and bench.name == "nano" else seeds
    for bits in (4, 3) if _whole(bench, lab) else (3,):
        budget = one_for_all(bench, bits).bytes
        ours = [measured(bench, evolved(bench, lab, spoil, budget, seed)[0]) for seed in seeds]
        theirs = [measured(bench, _rival(bench, lab, rival, budget, seed)) for seed in seeds]
        yield duel(f"bytes of uniform {bits} bits", ours, theirs, names=("evolved", rival))
        run = [float(evolved(bench, lab, spoil, budget, seed)[1]) for seed in seeds]
        yield [], {f"bytes of uniform {bits} bits: rows that the judge has run": spread(run, "rows")}


def _on(name: str, rival: str, spoil: Callable[[Judge], Judge], seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _against(bench, lab, rival, spoil, lab.draws(seeds)))


PAPER = Paper("Sieberling et al.", 2024, "arXiv:2410.14649", "section 4, tables 3 and 4")
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At equal bytes, evolved levels lose less KL and perplexity than one level for all.",
        where=PAPER,
        scale="nano, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 3 bits, 15 generations of 16, "
        "3 draws of the rows that are searched on (quick: 1), in rows of 256 tokens",
        check=partial(_on, "nano", "uniform", honest, SEEDS),
        broken=partial(_on, "nano", "uniform", Reversed, ONE),
    ),
    Claim(
        says="At equal bytes, evolved levels lose less KL and perplexity than one level for all, on a model trained by others.",
        where=PAPER,
        scale="stories260k on TinyStories, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 4 and 3 "
        "bits (quick: 3), 3 draws of the rows that are searched on, in rows of 256 tokens",
        check=partial(_on, "stories260k", "uniform", honest, SEEDS),
        broken=partial(_on, "stories260k", "uniform", Reversed, ONE),
    ),
    Claim(
        says="At equal bytes, evolved levels lose less KL and perplexity than those of least summed damage.",
        where=PAPER,
        scale="nano, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 3 bits, 15 generations of 16, "
        "3 draws of the rows that are searched on (quick: 1), in rows of 256 tokens",
        check=partial(_on, "nano", "sums", honest, SEEDS),
        broken=partial(_on, "nano", "sums", Reversed, ONE),
    ),
    Claim(
        says="At equal bytes, evolved levels lose less KL and perplexity than those of least summed damage, on a model trained by others.",
        where=PAPER,
        scale="stories260k on TinyStories, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 4 and 3 "
        "bits (quick: 3), 3 draws of the rows that are searched on, in rows of 256 tokens",
        check=partial(_on, "stories260k", "sums", honest, SEEDS),
        broken=partial(_on, "stories260k", "sums", Reversed, ONE),
    ),
    Claim(
        says="At equal bytes, evolved levels lose less KL and perplexity than a random search that runs as many rows.",
        where=PAPER,
        scale="nano, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 3 bits, 15 generations of 16, "
        "3 draws of the rows that are searched on (quick: 1), in rows of 256 tokens",
        check=partial(_on, "nano", "random", honest, SEEDS),
        broken=partial(_on, "nano", "random", Reversed, ONE),
    ),
    Claim(
        says="At equal bytes, evolved levels lose less KL and perplexity than a random search that runs as many "
        "rows, on a model trained by others.",
        where=PAPER,
        scale="stories260k on TinyStories, embedding included, round to nearest at 2 to 8 bits in groups of 64, bytes of uniform 4 and 3 "
        "bits (quick: 3), 3 draws of the rows that are searched on, in rows of 256 tokens",
        check=partial(_on, "stories260k", "random", honest, SEEDS),
        broken=partial(_on, "stories260k", "random", Reversed, ONE),
    ),
)
