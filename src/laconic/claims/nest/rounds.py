"""Claims of BitStack's order: what comes first between two rounds, and a model that gets better with every step of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from laconic.claims.lab import ONE, SEEDS, Bench, Found, duel, held, judged, measure, on, spread
from laconic.claims.nest.bitstack import DEEPEST, Astray
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.menu import Order, Trial
from laconic.core.packed import Packed
from laconic.core.transform import Transform
from laconic.elastic import arrange, stacks_of
from laconic.methods.nest.bits.bitstack import BitStack
from laconic.methods.nest.order.rounds import Rounds

# rows of calibration text for the trials
ROWS = 2


class Backwards(Order):
    """The stand-in: each round from its end."""

    def __call__(self, parts: Mapping[str, Sequence[int]], trial: Trial) -> Sequence[str]:
        found = list(Rounds()(parts, trial))
        rounds = [found[i : i + len(parts)] for i in range(0, len(found), len(parts))]
        return [name for one in rounds for name in reversed(one)]


class Layers(Order):
    """The baseline: rounds in the order of the model."""

    def __call__(self, parts: Mapping[str, Sequence[int]], trial: Trial) -> Sequence[str]:
        return [name for i in range(1, max(map(len, parts.values()))) for name, sizes in parts.items() if len(sizes) > i]


def ordered(bench: Bench, transform: Transform, order: Order, seed: int) -> list[str]:
    """The order of a stack's parts, by trials on rows drawn by the seed."""
    forms = held(bench, transform, DEEPEST, seed)
    names: list[str] = bench.once(
        ("ordered", transform, type(order), seed),
        lambda: arrange(
            bench.source, bench.source, forms.get, stacks_of(list(forms), forms.get), bench.drawn(seed)[:ROWS], order,
            batch=bench.batch, shelf=Path(), once=lambda key, make: bench.once(("trial", transform, seed, key), make),
        ),
    )  # fmt: skip
    return names


def within(bench: Bench, transform: Transform, order: Order, seed: int, share: float) -> Found:
    """The longest prefix of an order that takes a share of all bytes beyond the first parts, measured."""
    names = ordered(bench, transform, order, seed)
    forms = held(bench, transform, DEEPEST, seed)
    sizes = stacks_of(list(forms), forms.get).bytes
    room = share * sum(sum(parts[1:]) for parts in sizes.values())
    counts = dict.fromkeys(forms, 1)
    for name in names:
        room -= sizes[name][counts[name]]
        if room < 0:
            break
        counts[name] += 1
    kept: dict[str, Packed] = {name: form.first(counts[name]) for name, form in forms.items()}
    found: Found = bench.once(("within", transform, type(order), seed, share), lambda: measure(bench, kept))
    return found


def _between(share: float, lab: Lab, order: Order, seeds: Sequence[int]) -> Verdict:
    def check(bench: Bench) -> Verdict:
        pairs = [[within(bench, BitStack(), one, seed, share) for seed in lab.draws(seeds)] for one in (order, Layers())]
        return judged(*duel("half a round", *pairs, names=("sorted", "layer by layer")))

    return on(lab, "nano", check)


def _falling(lab: Lab, transform: Transform, seeds: Sequence[int]) -> Verdict:
    def check(bench: Bench) -> Verdict:
        wrong: list[str] = []
        numbers: dict[str, Measurement] = {}
        before: list[float] = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            found = [within(bench, transform, Rounds(), seed, share) for seed in lab.draws(seeds)]
            label = f"{share:.0%} of what can be left out"
            numbers[f"{label}: bytes"] = spread([float(one.bytes) for one in found], "bytes")
            numbers[f"{label}: KL"] = spread([one.kl for one in found], "nats/token")
            if before and any(now.kl >= then for now, then in zip(found, before, strict=True)):
                wrong.append(f"KL does not fall up to {label}")
            before = [one.kl for one in found]
        return judged(wrong, numbers)

    return on(lab, "nano", check)


PAPER = Paper("Wang et al.", 2024, "arXiv:2410.23918", "section 3.3")

SCALE = "nano, stacks of 3 blocks, trials on 2 x 512 tokens, 3 draws of the calibration rows"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Half through the second round, what was sorted by trial has a lower KL and perplexity than layer by layer at equal bytes.",
        where=PAPER,
        scale=SCALE,
        check=partial(_between, 0.25, order=Rounds(), seeds=SEEDS),
        broken=partial(_between, 0.25, order=Backwards(), seeds=ONE),
    ),
    Claim(
        says="Half through the third round, what was sorted by trial has a lower KL and perplexity than layer by layer at equal bytes.",
        where=PAPER,
        scale=SCALE,
        check=partial(_between, 0.75, order=Rounds(), seeds=SEEDS),
        broken=partial(_between, 0.75, order=Backwards(), seeds=ONE),
    ),
    Claim(
        says="KL falls with every quarter of the bytes that a stack is given.",
        where=PAPER,
        scale=SCALE + "; 5 sizes",
        check=partial(_falling, transform=BitStack(), seeds=SEEDS),
        broken=partial(_falling, transform=Astray(), seeds=ONE),
    ),
)
