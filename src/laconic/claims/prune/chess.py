"""Claims of CHESS: thresholds of channels against one for all (CATS), which projections of attention, and what is gained by not reading."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, Bench, Found, judged, measured, on, spread, swapped, turns
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.router import Routed, Router
from laconic.kernels.native import native
from laconic.kernels.skipping import lined, skipped
from laconic.measurement import load_of, outputs
from laconic.methods.prune.activation.chess import CHESS, Neurons
from laconic.pipeline import learn_routed

SHARES = (0.5, 0.7, 0.8)
# how much more of the neurons ours may leave running: thresholds are found on other text than they are measured on
SAME = 1.005
# a feed-forward layer of a model of 1.1 billion weights
WIDE = (5632, 2048)
LAYERS = 6


class Mistaken(Neurons):
    """Takes each neuron for its neighbour."""

    def looked(self) -> None:
        super().looked()
        if self._looks == 1 and self._mean is not None:
            self._mean = self._mean.roll(1)


class Measured(NamedTuple):
    """What was found, the multiplications as a share of the original's, and the mean error of a layer's output as a share of it."""

    found: Found
    load: float
    error: float


def _routed(bench: Bench, router: Router, seed: int) -> Measured:
    """Thresholds from the rows of a seed; measured once for each."""

    def make() -> Measured:
        with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
            model, parts, _ = learn_routed(bench.source, bench.source, bench.drawn(seed), router, seed=seed, folder=Path(scratch))
        found = measured(bench, model, 0)
        load, _ = load_of(model, bench.certify.inputs.split(bench.batch), "text")
        return Measured(found, load.expected / load.dense, _apart(bench, model, parts))

    result: Measured = bench.once(("routed", router, seed), make)
    return result


def _apart(bench: Bench, model: nn.Module, parts: dict[str, Routed]) -> float:
    """Squared error of a part's output at the inputs that it gets, as a share of its size, averaged over parts."""
    found: list[float] = []

    def compare(part: Any, args: Any, output: Tensor) -> None:
        part.asks = "all"
        whole = part.forward(args[0])
        part.asks = "router"
        found.append(float((output - whole).double().square().sum() / whole.double().square().sum()))

    hooks = [part.register_forward_hook(compare) for part in parts.values()]
    with torch.inference_mode():
        outputs(model)(bench.certify.inputs[: bench.batch])
    for hook in hooks:
        hook.remove()
    return statistics.fmean(found)


def _ahead(lab: Lab, ours: Callable[[float], Router], theirs: Callable[[float], Router], names: tuple[str, str], broken: bool) -> Verdict:
    """At every share: a lower error of layers, and a lower KL, with no more multiplications."""

    def check(bench: Bench) -> Verdict:
        numbers: dict[str, Measurement] = {}
        wrong: list[str] = []
        for share in SHARES:
            sides = [[_routed(bench, side(share), seed) for seed in (ONE if broken else lab.draws(SEEDS))] for side in (ours, theirs)]
            for name, side in zip(names, sides, strict=True):
                numbers[f"{name}, {share:.0%}: KL"] = spread([one.found.kl for one in side], "nats/token")
                numbers[f"{name}, {share:.0%}: error of a layer"] = spread([one.error for one in side], "")
                numbers[f"{name}, {share:.0%}: multiplications"] = spread([one.load for one in side], "")
            for a, b in zip(*sides, strict=True):
                if a.load > b.load * SAME:
                    wrong.append(f"at {share:.0%} more runs than under {names[1]}")
                if a.found.kl >= b.found.kl or a.error >= b.error:
                    wrong.append(f"at {share:.0%} KL or error is not below that of {names[1]}")
        return judged(list(dict.fromkeys(wrong)), numbers)

    return on(lab, "stories260k", check)


def _channels(broken: bool, lab: Lab) -> Verdict:
    def ours(share: float) -> Router:
        return swapped(CHESS(share, 0.0), Mistaken) if broken else CHESS(share, 0.0)

    return _ahead(
        lab, ours, lambda share: CHESS(share, 0.0, channels=False), ("a threshold for each channel", "one for all (CATS)"), broken
    )


def _projections(chosen: str, lab: Lab) -> Verdict:
    """Inputs of some projections of attention against fewer inputs of all, so that as many weights are left out."""

    def check(bench: Bench) -> Verdict:
        numbers: dict[str, Measurement] = {}
        wrong: list[str] = []
        size = {"q": 2.0, "k": 1.0, "v": 1.0, "o": 2.0}
        for share in (0.15, 0.3):
            mine = share * sum(size.values()) / sum(size[one] for one in chosen)
            sides = {
                f"{chosen}, {mine:.0%}": [_routed(bench, CHESS(0.0, mine, chosen), seed) for seed in lab.draws(SEEDS)],
                f"all, {share:.0%}": [_routed(bench, CHESS(0.0, share, "qkvo"), seed) for seed in lab.draws(SEEDS)],
            }
            for name, side in sides.items():
                numbers[f"{name}: KL"] = spread([one.found.kl for one in side], "nats/token")
                numbers[f"{name}: multiplications"] = spread([one.load for one in side], "")
            a, b = sides.values()
            if any(one.found.kl >= other.found.kl for one, other in zip(a, b, strict=True)):
                wrong.append(f"KL is not below that of all projections at {share:.0%}")
            if any(one.load > other.load * SAME for one, other in zip(a, b, strict=True)):
                wrong.append(f"more is multiplied at {share:.0%}")
        return judged(wrong, numbers)

    return on(lab, "stories260k", check)


def _through(layers: Sequence[tuple[Tensor, Tensor]], factors: Tensor, x: Tensor) -> None:
    for up, down in layers:
        skipped(factors, down, x, up)


def _faster(broken: bool, lab: Lab) -> Verdict:
    """One token through up and down of a wide layer in bf16, of layers that no cache holds, against all neurons by the same kernel."""
    if native() is None:
        return Verdict("cannot be checked here", {}, "the native kernels were not built here")
    (h, d), draw = WIDE, torch.Generator().manual_seed(0)
    layers = [(torch.randn(h, d, generator=draw).bfloat16(), lined(torch.randn(d, h, generator=draw).bfloat16())) for _ in range(LAYERS)]
    x, numbers, wrong = torch.randn(1, d, generator=draw), {}, []
    for share in SHARES:
        a = torch.randn(1, h, generator=draw)
        # what is left out is at random places, as in a text
        few = a if broken else a * (torch.rand(1, h, generator=draw) >= share)
        whole, some = turns([partial(_through, layers, one, x) for one in (a, few)], 5 if lab.quick else 15)
        ratios = [one / other for one, other in zip(whole, some, strict=True)]
        numbers[f"times as fast as all neurons, {share:.0%} left out"] = spread(ratios, "")
        if statistics.median(ratios) < 0.75 / (1 - share):
            wrong.append(f"with {share:.0%} left out a layer takes over {(1 - share) / 0.75:.0%} of the time")
    return judged(wrong, numbers)


PAPER = Paper("He et al.", 2024, "arXiv:2409.01366", "section 3")
SCALE = "stories260k on TinyStories, thresholds from 16 x 512 tokens (in full 64), 3 draws of them"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With as many neurons left out, thresholds of channels cost less than one for all channels (CATS), at 50, 70 and 80 %.",
        where=PAPER,
        scale=SCALE,
        check=partial(_channels, False),
        broken=partial(_channels, True),
    ),
    Claim(
        says="To leave out inputs of q and o alone costs less than to leave out as many weights of all projections of attention.",
        where=PAPER,
        scale=f"{SCALE}; the stand-in leaves out inputs of k and v alone",
        check=partial(_projections, "qo"),
        broken=partial(_projections, "kv"),
    ),
    Claim(
        says="A token takes little more than the share of the time that is left, where neurons are left out of a wide layer.",
        where=PAPER,
        scale="up and down of 5632 x 2048 in bf16, one token, neurons at random places; at most 4/3 of the share of the time",
        check=partial(_faster, False),
        broken=partial(_faster, True),
        timed=True,
    ),
)
