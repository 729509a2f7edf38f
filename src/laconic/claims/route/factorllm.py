"""Claims of FactorLLM: experts that sum to the layer, and what routers taught by the layer itself are worth after a short tuning."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.claims.lab import ONE, SEEDS, Bench, Found, judged, measured, on, spread, swapped
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.router import Router
from laconic.measurement import load_of, outputs
from laconic.methods.route.gate.factorllm import Experts, FactorLLM
from laconic.pipeline import learn_routed
from laconic.routing import begin, install, parts_of
from laconic.tuning import tune

# rows of the calibration text, of so many tokens each
ROWS, TOKENS = 256, 128
Theirs = Literal["unlabelled", "guessed", "narrow"]
SHORT = FactorLLM(rate=1e-3, router_rate=1e-2, batch=8)


class Mistaught(Experts):
    """Learns to name what is nearest to the layer for another token."""

    def label(self, outs: Tensor, x: Tensor) -> Tensor:
        return super().label(outs, x).roll(len(x) // 2, 0)


class Guessing(Experts):
    """Names any experts, of a seed at each pass."""

    def logits(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seen)
        return 0 * F.linear(x, self.router) + torch.randn(len(x), self.experts, generator=generator)


def _steps(lab: Lab) -> int:
    return 40 if lab.quick else 400


def _rows(bench: Bench, seed: int) -> Tensor:
    rows = bench.pool.reshape(-1, TOKENS)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:ROWS]]


def _routed(lab: Lab, bench: Bench, router: Router, seed: int) -> Found:
    """Learned on the rows of a seed and measured; once for each."""

    def make() -> Found:
        with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
            model, _, said = learn_routed(bench.source, bench.source, _rows(bench, seed), router, seed=seed, folder=Path(scratch))
        lab.log(f"{router}, seed {seed}: {said}")
        return measured(bench, model, 0)

    found: Found = bench.once(("routed", router, seed), make)
    return found


def _narrow(lab: Lab, bench: Bench, router: FactorLLM, seed: int) -> Found:
    """Feed-forward layers of the k/N of their neurons that say most (the mean of |h_j| over the rows, times the norm of its column),
    learned alike: the same lesson, rows and order."""

    def make() -> Found:
        rows, model = _rows(bench, seed), bench.source.load(torch.float32)
        teacher, run = outputs(bench.source.load(torch.float32)), outputs(model)
        learns: dict[str, nn.Module] = {}
        for site in bench.source.anatomy.sublayers():
            if site.roles["part"] != "mlp":
                continue
            layer: Any = model.get_submodule(site.name)
            loud = _loudness(run, layer.down_proj, rows[:32]) * layer.down_proj.weight.norm(dim=0)
            keep = loud.topk(len(loud) * router.active // router.experts).indices.sort().values
            for linear, axis in ((layer.gate_proj, 0), (layer.up_proj, 0), (layer.down_proj, 1)):
                linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, keep))
            learns[site.name] = layer
        batches = rows.split(router.batch)
        with torch.inference_mode():
            made = [teacher(batch).half() for batch in batches]
        tune(
            lambda i, _: run(batches[i]), [one.clone() for one in made], learns, router.lesson,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return measured(bench, model, 0)

    found: Found = bench.once(("narrow", router.active, router.steps, seed), make)
    return found


def _loudness(run: Any, writer: nn.Module, rows: Tensor) -> Tensor:
    """(h,): the mean absolute input of a layer's writer."""
    seen: list[Tensor] = []
    hook = writer.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().flatten(0, -2).mean(0)))
    with torch.inference_mode():
        run(rows)
    hook.remove()
    return seen[0].clone()


def _lower(lab: Lab, bench: Bench, ours: Router, theirs: Theirs, base: FactorLLM, seeds: Sequence[int]) -> Verdict:
    mine = [_routed(lab, bench, ours, seed) for seed in seeds]
    if theirs == "narrow":
        name, rival = "as few neurons, the same for all tokens", [_narrow(lab, bench, base, seed) for seed in seeds]
    elif theirs == "guessed":
        name, rival = "experts by chance", [_routed(lab, bench, swapped(replace(base, weight=0.0), Guessing), seed) for seed in seeds]
    else:
        name, rival = "routers by the objective alone", [_routed(lab, bench, replace(base, weight=0.0), seed) for seed in seeds]
    numbers: dict[str, Measurement] = {"loss of the original": spread([mine[0].original], "nats/token")}
    for label, found in (("routers by the layer", mine), (name, rival)):
        numbers[f"{label}: loss"] = spread([one.loss for one in found], "nats/token")
        numbers[f"{label}: KL"] = spread([one.kl for one in found], "nats/token")
    wrong = [f"the loss is not below that of {name}"] if any(a.loss >= b.loss for a, b in zip(mine, rival, strict=True)) else []
    return judged(wrong, numbers)


def _compared(theirs: Theirs, plain: bool, broken: bool, lab: Lab) -> Verdict:
    base = replace(SHORT, steps=_steps(lab), plain=plain)
    ours, seeds = (swapped(replace(base, weight=10.0), Mistaught), ONE) if broken else (base, lab.draws(SEEDS))
    return on(lab, "stories260k", lambda bench: _lower(lab, bench, ours, theirs, base, seeds))


def _whole(active: int, lab: Lab) -> Verdict:
    """N experts of N, before anything is learned; and what k of N multiply."""

    def check(bench: Bench) -> Verdict:
        numbers, differences = {}, []
        for seed in lab.draws(SEEDS):
            model = bench.source.load(torch.float32)
            parts, _ = parts_of(bench.source, FactorLLM(active=active, plain=True), model)
            install(model, parts)
            begin(parts, seed)
            with torch.inference_mode():
                said = outputs(model)(bench.certify.inputs[: bench.batch])
            differences.append(float((said - bench.logits[0]).norm() / bench.logits[0].norm()))
        load, seen = load_of(model, bench.certify.inputs[: bench.batch].split(4), "text")
        numbers["difference of the logits, as a share"] = spread(differences, "")
        numbers["multiplications, as a share of the original's"] = Measurement(load.expected / load.dense, "", seen)
        return judged([] if max(differences) < 1e-5 else ["the experts do not sum to the layer"], numbers)

    return on(lab, "stories260k", check)


PAPER = Paper("Zhao et al.", 2024, "arXiv:2408.11855", "section 3")
SCALE = (
    f"stories260k on TinyStories, 2 of 4 experts, routers and experts learned on {ROWS} x {TOKENS} tokens in 40 steps of 8 rows (in full "
    "400), KL to the original in place of the loss of the text, 3 seeds"
)
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With all experts active the model is the dense one.",
        where=PAPER,
        scale="stories260k on TinyStories, 4 experts, 3 seeds of routers",
        check=partial(_whole, 4),
        broken=partial(_whole, 3),
    ),
    Claim(
        says="After the same short tuning, routers taught by the layer lose less than routers that learn from the output alone.",
        where=PAPER,
        scale=SCALE,
        check=partial(_compared, "unlabelled", False, False),
        broken=partial(_compared, "unlabelled", False, True),
    ),
    Claim(
        says="After the same short tuning, the experts of such routers lose less than as few neurons, the same for all tokens.",
        where=PAPER,
        scale=SCALE,
        check=partial(_compared, "narrow", False, False),
        broken=partial(_compared, "narrow", False, True),
    ),
    Claim(
        says="After the same short tuning, the experts of routers taught by the layer lose less than as many experts by chance.",
        where=PAPER,
        scale=SCALE,
        check=partial(_compared, "guessed", False, False),
        broken=partial(_compared, "guessed", False, True),
    ),
    Claim(
        says="Where experts are summed plainly, routers taught by the layer lose less than routers that learn from the output alone.",
        where=PAPER,
        scale=SCALE,
        check=partial(_compared, "unlabelled", True, False),
        broken=partial(_compared, "unlabelled", True, True),
    ),
    Claim(
        says="Where experts are summed plainly, those of such routers lose less than as few neurons, the same for all tokens.",
        where=PAPER,
        scale=SCALE,
        check=partial(_compared, "narrow", True, False),
        broken=partial(_compared, "narrow", True, True),
    ),
)
