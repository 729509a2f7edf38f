"""Claims of taking out sub-layers: finer than whole blocks, by the same ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Reversed, duel, gathered, honest, on
from laconic.claims.prune.finercut import blocks, found_of, gone, opened, ranked, without
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.menu import Judge


@gathered
def _finer(bench: Bench, lab: Lab, spoil: Callable[[Judge], Judge], seeds: Sequence[int]) -> Iterator[Duel]:
    for count in (1, 2):
        ours, theirs = [], []
        for seed in seeds[:1] if lab.quick else seeds:
            menu, judge = opened(bench, lab, seed)
            size = without(menu, [name for names in blocks(menu)[:count] for name in names]).bytes
            ours.append(found_of(bench, ranked(menu, spoil(judge), [(name,) for name in gone(menu)], size)))
            theirs.append(found_of(bench, ranked(menu, judge, blocks(menu), size)))
        label = f"the parameters of {count} block{'s' if count > 1 else ''} gone"
        yield duel(label, ours, theirs, names=("sub-layers", "whole blocks"))


def _on(name: str, spoil: Callable[[Judge], Judge], seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _finer(bench, lab, spoil, seeds))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At equal removed parameters, sub-layers that move the output least when gone alone lose less than whole blocks so ranked.",
        where=Paper("Zhang et al.", 2024, "arXiv:2405.18218", "section 3.1"),
        scale="nano, the parameters of 1 and 2 of 8 blocks, 3 draws of the rows (quick: 1), 8 rows of 512 tokens",
        check=partial(_on, "nano", honest, SEEDS),
        broken=partial(_on, "nano", Reversed, ONE),
    ),
)
