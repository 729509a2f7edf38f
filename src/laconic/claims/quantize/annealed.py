"""Claims of vectors that cool down: against tables that learn alone, and against entries from the first step on with gradients passed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, gathered, on, spread
from laconic.claims.quantize.lr2vq import NET, OURS, STEPS, Fixed, learned
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.packed import Packed, Soft
from laconic.methods.quantize.round.lr2vq import LR2VQ
from laconic.methods.quantize.train.annealed import Annealed


@dataclass(frozen=True)
class Straight(Annealed):
    """The same rates and steps, an entry for each vector from the first step on."""

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target)


@gathered
def _below(bench: Bench, lab: Lab, rival: type[Annealed], name: str, astray: bool, seeds: Sequence[int]) -> Iterator[Duel]:
    ours = [learned(bench, lab, LR2VQ(seed), OURS, Annealed, seed, astray) for seed in seeds]
    theirs = [learned(bench, lab, LR2VQ(seed), OURS, rival, seed) for seed in seeds]
    for label, found in (("cooling down", ours), (name, theirs)):
        yield [], {f"KL, {label}": spread([one.kl for one in found], "nats/image")}
        yield [], {f"right answers, {label}": spread([one.loss for one in found], "share")}
    pairs = list(zip(ours, theirs, strict=True))
    wrong = [f"KL is not below that of {name}"] if any(a.kl >= b.kl for a, b in pairs) else []
    yield wrong + ([f"no more right answers than {name}"] if any(a.loss <= b.loss for a, b in pairs) else []), {}


def _against(rival: type[Annealed], name: str, astray: bool, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, "resnet20", lambda bench: _below(bench, lab, rival, name, astray, lab.draws(seeds)))


PAPER = Paper("Zhu et al.", 2022, "arXiv:2211.11397")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Vectors that cool down have a lower KL and more right answers than tables and bases that learn while codes stay.",
        where=PAPER,
        scale=f"{NET}, {STEPS}, 3 draws",
        check=partial(_against, Fixed, "tables alone", False, SEEDS),
        broken=partial(_against, Fixed, "tables alone", True, ONE),
    ),
    Claim(
        says="Vectors that cool down have a lower KL and more right answers than entries from the first step on with gradients passed.",
        where=PAPER,
        scale=f"{NET}, {STEPS}, 3 draws",
        check=partial(_against, Straight, "straight through", False, SEEDS),
        broken=partial(_against, Straight, "straight through", True, ONE),
    ),
)
