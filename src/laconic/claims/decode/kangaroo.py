"""Claims of Kangaroo: the same tokens in fewer passes, what the second exit is worth, and what comes of it on the clock."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laconic.claims.lab import SEEDS, judged, long_text, open_bench, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.decoder import Decoder, Draw, Round, Stack
from laconic.decoding import Layers, body_of
from laconic.measurement import drafting, plainly
from laconic.methods.cache.store.full import Full
from laconic.methods.decode.draft.kangaroo import PART, Kangaroo
from laconic.pipeline import learn_parts

Parts = Mapping[str, nn.Module]
Make = Callable[[Lab, int], Parts]
DEPTH = 8


@dataclass(frozen=True)
class Unjudged(Decoder):
    """A stand-in: what is drafted is taken as it comes."""

    lossless: ClassVar[bool] = False
    tap: int = 2

    def __call__(self, stack: Stack, prompt: Tensor, *, limit: int, draw: Draw, ends: frozenset[int] = frozenset()) -> Iterator[Round]:
        step = prompt
        for _ in range(limit):
            features = stack.parts[PART](stack.rise(step, self.tap), stack.length, partial(stack.mix, 0))
            stack.settle(step.shape[1])
            step = torch.tensor([[draw.pick(draw.odds(stack.head(features[:, -1])[0]))]])
            yield Round(step, 1, 1)


def _learned(lab: Lab, seed: int) -> Parts:
    """The adapter learned on texts of a seed; once for each seed."""
    bench = open_bench("nano", lab.data, lab.quick)
    assert bench is not None
    count, steps = (32, 40) if lab.quick else (128, 320)

    def learn() -> Parts:
        order = torch.randperm(bench.pool.shape[0], generator=torch.Generator().manual_seed(seed))
        with tempfile.TemporaryDirectory(prefix="laconic-") as scratch:
            rows = bench.pool[order[:count]]
            return learn_parts(bench.source, bench.source, rows, Kangaroo(steps=steps), seed=seed, folder=Path(scratch))[0]

    found: Parts = bench.once(("kangaroo", seed), learn)
    return found


def _begun(lab: Lab, seed: int) -> Parts:
    """A stand-in: the adapter before it has learned anything."""
    body = body_of(long_text()[0].config)
    return Kangaroo().place(body, torch.Generator().manual_seed(seed)).place


def _found(lab: Lab, seed: int, decoder: Decoder, make: Make) -> dict[str, Any]:
    """Figures on the held-out prompts of a seed, measured once."""
    bench = open_bench("nano", lab.data, lab.quick)
    assert bench is not None
    model, rows = long_text()
    count, new = (4, 48) if lab.quick else (20, 64)
    prompts = rows[seed * count : (seed + 1) * count, :64]

    def measured() -> dict[str, Any]:
        parts = make(lab, seed)
        return drafting(decoder, lambda: Layers(model, Full(), parts), partial(plainly, model), prompts, new=new)

    found: dict[str, Any] = bench.once(("drafting", seed, decoder, make), measured)
    return found


def _cost(found: Mapping[str, Any]) -> float:
    """Passes a token, the adapter's counted as if it were a whole layer."""
    return float(found["layer_passes_per_token"] + found["part_passes_per_token"])


def _numbers(found: list[dict[str, Any]]) -> dict[str, Measurement]:
    return {
        "drafted tokens that stand": spread([one["drafts_accepted"] for one in found], "share"),
        "tokens a pass": spread([one["tokens_per_pass"] for one in found], "tokens"),
        "layer passes a token": spread([one["layer_passes_per_token"] for one in found], "passes"),
        "layer and adapter passes a token": spread([_cost(one) for one in found], "passes"),
        "tokens a second, as a multiple of one by one": spread([one["details"]["drafted_tokens_per_s"]["ratio"] for one in found], ""),
        "prompts with the same tokens": spread([one["drafted_same_as_plain"] for one in found], "share"),
    }


def _cheaper(lab: Lab, decoder: Decoder) -> Verdict:
    found = [_found(lab, seed, decoder, _learned) for seed in lab.draws(SEEDS)]
    wrong = [] if all(one["drafted_same_as_plain"] == 1 for one in found) else ["other tokens than one by one"]
    wrong += [] if all(_cost(one) < DEPTH for one in found) else [f"no fewer than {DEPTH} passes a token"]
    return judged(wrong, _numbers(found))


def _exit(lab: Lab, make: Make) -> Verdict:
    """Against each fixed length of the draft, with the learned adapter."""
    found = [_found(lab, seed, Kangaroo(), make) for seed in lab.draws(SEEDS)]
    numbers, wrong = _numbers(found), []
    for most in range(1, 7):
        fixed = [_found(lab, seed, Kangaroo(eta=0.0, most=most), _learned) for seed in lab.draws(SEEDS)]
        numbers[f"layer and adapter passes a token, always {most}"] = spread([_cost(one) for one in fixed], "passes")
        if any(_cost(a) >= _cost(b) for a, b in zip(found, fixed, strict=True)):
            wrong.append(f"no cheaper a token than {most} at a time")
    return judged(wrong, numbers)


def _faster(lab: Lab, make: Make) -> Verdict:
    found = [_found(lab, seed, Kangaroo(), make) for seed in lab.draws(SEEDS)]
    ratios = [one["details"]["drafted_tokens_per_s"]["ratio"] for one in found]
    return judged([] if min(ratios) > 1 else [f"{min(ratios):.2f}x the speed of one by one"], _numbers(found))


SCALE = (
    "nano in fp32, the adapter learned on 32 x 512 tokens in 40 steps (in full 128 x 512 in 320), 48 greedy tokens after 64 "
    "of held-out text, 3 seeds of 4 prompts each (in full 20 of 64 tokens)"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="The tokens are those of decoding one by one, at fewer passes of layers a token, the adapter counted as a layer.",
        where=Paper("Liu et al.", 2024, "arXiv:2404.18911", "abstract"),
        scale=SCALE,
        check=partial(_cheaper, decoder=Kangaroo()),
        broken=partial(_cheaper, decoder=Unjudged()),
    ),
    Claim(
        says="Ending the draft by confidence costs fewer passes a token than every fixed length of the draft.",
        where=Paper("Liu et al.", 2024, "arXiv:2404.18911", "section 3.2"),
        scale=SCALE,
        check=partial(_exit, make=_learned),
        broken=partial(_exit, make=_begun),
    ),
    Claim(
        says="A single text is decoded faster than one token at a time.",
        where=Paper("Liu et al.", 2024, "arXiv:2404.18911", "abstract"),
        scale=SCALE,
        check=partial(_faster, make=_learned),
        broken=partial(_faster, make=_begun),
        timed=True,
    ),
)
