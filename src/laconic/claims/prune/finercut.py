"""Claims of taking sub-layers out round by round: against one ranking by the same measure, and against whole blocks by their influence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, Remembering, Reversed, duel, gathered, honest, measure, on, spread
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.menu import Budget, Judge, Menu, Plan, Row, plan_of
from laconic.core.packed import Absent, Dense, Packed
from laconic.kernels.losses import JensenShannon
from laconic.measurement import outputs
from laconic.methods.prune.schedule.finercut import FinerCut, dearest
from laconic.pipeline import kept_tensor, price, quiet, trials
from laconic.recipe import Choice, Recipe
from laconic.trials import Recorded, form_key

RECIPE = Recipe(name="sub-layers", choices=(Choice(method="prune.cut.sublayer", levels=({},), kinds=("sublayer",)),))
ROW = 256


def opened(bench: Bench, lab: Lab, seed: int) -> tuple[Menu, Judge]:
    """All sub-layers, each gone or as it is, and a judge over the rows of a seed."""

    def make() -> tuple[Menu, Judge]:
        work = Remembering(lab.scratch)
        rows, _ = price(bench.source, None, RECIPE, seed=seed, work=work, progress=quiet, batch=bench.batch)
        for row in rows:
            if row.site:
                forms = {name: Absent(bench.source.infos[name].shape).describe() for name in row.covers}
                work.finish(form_key(row), {"forms": forms})
        # a few short sequences
        inputs = bench.drawn(seed)[:8].reshape(-1, ROW)
        return Menu(tuple(rows)), Recorded(trials(bench.source, inputs, JensenShannon(), work), work)

    found: tuple[Menu, Judge] = bench.once(("sub-layers", seed), make)
    return found


def gone(menu: Menu) -> dict[str, Row]:
    """What may go, by name, in order of execution."""
    return {row.site: row for row in menu.rows if row.site}


def without(menu: Menu, names: Sequence[str]) -> Plan:
    """The plan in which these sub-layers are gone."""
    rows = [gone(menu)[name] for name in names]
    taken = {name for row in rows for name in row.covers}
    return plan_of(menu, [*(row for row in dearest(menu) if not row.covers & taken), *rows])


def blocks(menu: Menu) -> list[tuple[str, ...]]:
    """The sub-layers of each block."""
    found: dict[str, list[str]] = {}
    for name in gone(menu):
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return [tuple(names) for names in found.values()]


def ranked(menu: Menu, judge: Judge, units: Sequence[Sequence[str]], bytes: int) -> Plan:
    """The units that move the output least when each is gone alone, gone together, as many as it takes."""
    alone = [damage.value for damage in judge([without(menu, unit) for unit in units])]
    return first(menu, [units[i] for i in sorted(range(len(units)), key=lambda i: alone[i])], bytes)


def first(menu: Menu, units: Sequence[Sequence[str]], bytes: int) -> Plan:
    """Units gone in this order until the plan fits."""
    names: list[str] = []
    for unit in units:
        if without(menu, names).bytes <= bytes:
            break
        names += unit
    return without(menu, names)


def influence(bench: Bench, menu: Menu, seed: int) -> list[float]:
    """Block influence, Men et al. 2024 (ShortGPT), arXiv:2403.03853, eq. 1: 1 - mean over tokens of cos(state before, state after)."""
    model = bench.source.load(torch.float32)
    sums = [0.0] * len(blocks(menu))
    hooks = []
    for number, names in enumerate(blocks(menu)):

        def seen(module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...], number: int = number) -> None:
            after = out[0] if isinstance(out, tuple) else out
            sums[number] += float((1 - torch.cosine_similarity(args[0], after, -1)).sum())

        hooks.append(model.get_submodule(names[0].rpartition(".")[0]).register_forward_hook(seen))
    run, inputs = outputs(model), bench.drawn(seed)[:8]
    with torch.inference_mode():
        for one in inputs:
            run(one[None])
    for hook in hooks:
        hook.remove()
    return [total / inputs.numel() for total in sums]


def found_of(bench: Bench, plan: Plan) -> Found:
    """A plan at the output, what stays in bf16; equal plans are measured once."""

    def make() -> Found:
        forms: dict[str, Packed] = {}
        for row in plan.rows:
            for name in row.covers:
                forms[name] = Absent(bench.source.infos[name].shape) if row.site else Dense(kept_tensor(bench.source.read(name)))
        return measure(bench, forms)

    result: Found = bench.once(("without", *sorted(row.site for row in plan.rows if row.site)), make)
    return result


def greedy(bench: Bench, lab: Lab, spoil: Callable[[Judge], Judge], bytes: int, seed: int) -> Plan:
    """What FinerCut finds; each round is run once, whatever the budget."""
    menu, judge = opened(bench, lab, seed)
    return FinerCut(rows=judge.rows)(menu, Budget(bytes), judge=spoil(judge), rng=torch.Generator().manual_seed(seed), log=lambda _: None)


@gathered
def _against(bench: Bench, lab: Lab, rival: str, spoil: Callable[[Judge], Judge], seeds: Sequence[int]) -> Iterator[Duel]:
    seeds = seeds[:1] if lab.quick and bench.name == "nano" else seeds
    count = len(blocks(opened(bench, lab, 0)[0]))
    # 1, 2 and 3 of nano's 8 blocks are 12, 25 and 37 % of them
    for share in (0.125, 0.25, 0.375):
        pairs: list[tuple[Plan, Plan]] = []
        for seed in seeds:
            menu, judge = opened(bench, lab, seed)
            size = without(menu, [name for names in blocks(menu)[: max(1, round(share * count))] for name in names]).bytes
            pairs.append((greedy(bench, lab, spoil, size, seed), _rival(bench, menu, judge, rival, size, seed)))
        label = f"{share:.1%} of the blocks' parameters gone"
        ours, theirs = ([found_of(bench, plan) for plan in plans] for plans in zip(*pairs, strict=True))
        yield duel(label, ours, theirs, names=("FinerCut", rival))
        for kind, word in (("attention sub-layers among those", "attn"), ("sub-layers", "")):
            count_of = [float(sum(bool(row.site) and word in row.site for row in plan.rows)) for plan, _ in pairs]
            yield [], {f"{label}: {kind} gone": spread(count_of, "sub-layers")}


def _rival(bench: Bench, menu: Menu, judge: Judge, name: str, bytes: int, seed: int) -> Plan:
    if name == "one ranking":
        return ranked(menu, judge, [(site,) for site in gone(menu)], bytes)
    scores = bench.once(("influence", seed), lambda: influence(bench, menu, seed))
    return first(menu, [blocks(menu)[i] for i in sorted(range(len(scores)), key=lambda i: scores[i])], bytes)


def _on(name: str, rival: str, spoil: Callable[[Judge], Judge], seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _against(bench, lab, rival, spoil, lab.draws(seeds)))


PAPER = Paper("Zhang et al.", 2024, "arXiv:2405.18218", "section 4.2")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At equal removed parameters, sub-layers taken out round by round lose less KL and perplexity than whole blocks by influence.",
        where=PAPER,
        scale="nano, 12, 25 and 37 % of the blocks' parameters, 3 draws of the rows (quick: 1), 8 rows of 512 tokens",
        check=partial(_on, "nano", "whole blocks", honest, SEEDS),
        broken=partial(_on, "nano", "whole blocks", Reversed, ONE),
    ),
    Claim(
        says="At equal removed parameters, sub-layers taken out round by round lose less KL and perplexity than those of one ranking.",
        where=PAPER,
        scale="nano, 12, 25 and 37 % of the blocks' parameters, 3 draws of the rows (quick: 1), 8 rows of 512 tokens",
        check=partial(_on, "nano", "one ranking", honest, SEEDS),
        broken=partial(_on, "nano", "one ranking", Reversed, ONE),
    ),
)
