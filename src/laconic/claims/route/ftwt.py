"""Claims of FTWT: filters by the image against filters for good, what a mass will cost, and sparse execution that computes the same."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, Bench, Found, judged, measured, multiplications, narrowed, on, spread, swapped
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.router import Load, Router, asking
from laconic.measurement import load_of, outputs, routed
from laconic.methods.prune.cut.spa import Spa
from laconic.methods.prune.score.magnitude import Magnitude
from laconic.methods.route.gate.ftwt import FTWT, Gated
from laconic.pipeline import learn_routed
from laconic.routing import foreseen
from laconic.tuning import tune

OURS = FTWT(mass=0.85)


class Done(NamedTuple):
    """A model that has learned, on the certify images: what it says, what it multiplies, what was foreseen of that."""

    model: nn.Module
    found: Found
    load: Load
    foreseen: float

    @property
    def share(self) -> float:
        """Of the original's multiplications, on average."""
        return self.load.expected / self.load.dense


class Astray(Gated):
    """Its head learns to name as many filters, but others."""

    def label(self, y: Tensor) -> Tensor:
        return super().label(y).roll(y.shape[1] // 2, 1)


class Deaf(Gated):
    """Its head learns nothing: all filters run."""

    def penalty(self, done: float) -> Tensor | None:
        return None


def _ours(lab: Lab) -> FTWT:
    return replace(OURS, steps=64, batch=32) if lab.quick else replace(OURS, steps=1000)


def _learned(lab: Lab, bench: Bench, router: Router, seed: int) -> Done:
    """Learned in the order of a seed; once for each."""

    def make() -> Done:
        before = foreseen(bench.source, bench.pool[:512], router, bench.batch)
        with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
            model, _, said = learn_routed(bench.source, bench.source, bench.pool, router, seed=seed, folder=Path(scratch))
        lab.log(f"{router}, seed {seed}: {said}")
        with asking(routed(model), "masked", "router"):
            load, _ = load_of(model, bench.certify.inputs.split(bench.batch), "classify")
            return Done(model, measured(bench, model, 0), load, before["expected"])

    done: Done = bench.once(("routed", router, seed), make)
    return done


def _static(lab: Lab, bench: Bench, router: FTWT, share: float, seed: int) -> tuple[Found, float]:
    """Channels of least L1 gone for good, as many of each group, from a model that multiplies no less than `share` of the original; then
    learned alike: the same lesson, images and order."""

    def make() -> tuple[Found, float]:
        whole = multiplications(bench.source.load(torch.float32), bench.certify.inputs[:1])
        keep, had, model = share, 0.0, nn.Module()
        while had < share and keep < 1:
            model = narrowed(bench, Spa(Magnitude()), keep, seed, "data").load(torch.float32)
            had, keep = multiplications(model, bench.certify.inputs[:1]) / whole, keep + 0.01
        with torch.inference_mode():
            teacher = outputs(bench.source.load(torch.float32))
            batches = bench.pool.split(router.batch)
            targets = [teacher(batch) for batch in batches]
        run = outputs(model.train().requires_grad_(True))
        tune(
            lambda i, _: run(batches[i]), [one.clone() for one in targets], {"": model}, router.lesson,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return measured(bench, model.eval(), 0), had

    made: tuple[Found, float] = bench.once(("static", router, round(share, 6), seed), make)
    return made


def _better(lab: Lab, bench: Bench, router: Router, base: FTWT, seeds: Sequence[int]) -> Verdict:
    ours = [_learned(lab, bench, router, seed) for seed in seeds]
    theirs = [_static(lab, bench, base, one.share, seed) for one, seed in zip(ours, seeds, strict=True)]
    numbers: dict[str, Measurement] = {"right classes of the original": spread([ours[0].found.original], "")}
    for label, found, shares in (
        ("filters by the image", [one.found for one in ours], [one.share for one in ours]),
        ("filters for good, least L1 gone", [one for one, _ in theirs], [had for _, had in theirs]),
    ):
        numbers[f"{label}: right classes"] = spread([one.loss for one in found], "")
        numbers[f"{label}: KL"] = spread([one.kl for one in found], "nats")
        numbers[f"{label}: multiplications as a share of the original's"] = spread(shares, "")
    wrong = ["no more classes are right than with filters for good"] if any(
        a.found.loss <= b.loss for a, (b, _) in zip(ours, theirs, strict=True)
    ) else []  # fmt: skip
    if not all(0.5 <= one.share <= 0.7 for one in ours):
        wrong.append("not between 50 and 70 % of the multiplications")
    return judged(wrong, numbers)


def _foretold(lab: Lab, bench: Bench, router: Router, seeds: Sequence[int]) -> Verdict:
    done = [_learned(lab, bench, router, seed) for seed in seeds]
    ratios = [one.foreseen / one.load.expected for one in done]
    numbers = {
        "foreseen, as a share of the original's": spread([one.foreseen / one.load.dense for one in done], ""),
        "measured, as a share of the original's": spread([one.share for one in done], ""),
        "foreseen / measured": spread(ratios, ""),
    }
    return judged([] if all(abs(ratio - 1) <= 0.1 for ratio in ratios) else ["what was foreseen is off by more than 10 %"], numbers)


def _gathered(lossy: bool, lab: Lab, bench: Bench, router: Router, seeds: Sequence[int]) -> Verdict:
    """lossy: what is gathered lacks the first channel of each input."""
    differences = []
    for seed in seeds:
        model = _learned(lab, bench, router, seed).model
        inputs = bench.certify.inputs[: bench.batch]
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            with asking(routed(model), "masked", "router"):
                whole = outputs(model)(inputs)
            for part in routed(model) if lossy else ():
                stack.callback(part.register_forward_pre_hook(lambda part, args: (_without_first(args[0]),)).remove)
            sparse = outputs(model)(inputs)
        differences.append(float((sparse - whole).norm() / whole.norm()))
    numbers = {"difference of the logits, as a share": spread(differences, "")}
    return judged([] if max(differences) <= 1e-5 else ["what is gathered is not what is masked"], numbers)


def _without_first(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)


Check = Callable[[Lab, Bench, Router, Sequence[int]], Verdict]


def _on(check: Check | None, kind: type[Gated] | None, lab: Lab) -> Verdict:
    base = _ours(lab)
    router, seeds = (base, lab.draws(SEEDS)) if kind is None else (swapped(base, kind), ONE)
    if check is None:
        return on(lab, "resnet20", lambda bench: _better(lab, bench, router, base, seeds))
    return on(lab, "resnet20", lambda bench: check(lab, bench, router, seeds))


PAPER = Paper("Elkerdawy et al.", 2022, "arXiv:2110.08232", "section 4")
SCALE = (
    "ResNet-20 on CIFAR-10, all convolutions, mass 0.85, 2,048 training images in 64 steps of 32 (in full 1,000 of 64), KL to the original "
    "in place of the loss of the classes, 3 orders"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At the same multiplications on average, more classes are right than with channels of least L1 gone for good, tuned alike.",
        where=PAPER,
        scale=SCALE,
        check=partial(_on, None, None),
        broken=partial(_on, None, Astray),
    ),
    Claim(
        says="Multiplications that are foreseen before learning are within 10 % of what is measured after it.",
        where=PAPER,
        scale=SCALE,
        check=partial(_on, _foretold, None),
        broken=partial(_on, _foretold, Deaf),
    ),
    Claim(
        says="Computing only the filters that are asked for gives what masking all of them gives, to 1e-5.",
        where=PAPER,
        scale=SCALE,
        check=partial(_on, partial(_gathered, False), None),
        broken=partial(_on, partial(_gathered, True), None),
    ),
)
