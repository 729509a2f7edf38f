"""The claim of drawing token by token: what is drawn is as likely as the model says, and likelier where the distribution is sharpened."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from laconic.claims.lab import SEEDS, judged, long_text, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.decoder import Draw
from laconic.decoding import Layers
from laconic.measurement import decoded
from laconic.methods.cache.store.full import Full
from laconic.methods.decode.sample.ancestral import Ancestral

PROMPT = 64


def _drawn(temperature: float, seed: int, count: int, new: int) -> tuple[list[float], list[float]]:
    """The mean loss of each drawn text under the model, and the mean entropy of what its tokens were to be drawn from."""
    model, rows = long_text()
    losses, entropies = [], []
    generator = torch.Generator().manual_seed(seed)
    for prompt in rows[seed * count : (seed + 1) * count, :PROMPT].split(1):
        tokens = decoded(Ancestral(), Layers(model, Full()), prompt, new=new, draw=Draw(temperature, generator)).tokens
        text = torch.cat([prompt, torch.tensor([tokens])], 1)
        with torch.inference_mode():
            chances = model(text, use_cache=False).logits[0, PROMPT - 1 : -1].float().log_softmax(-1)
        losses.append(float(-chances.gather(1, text[0, PROMPT:, None]).mean()))
        entropies.append(float(-(chances.exp() * chances).sum(-1).mean()))
    return losses, entropies


def _calibrated(lab: Lab, temperature: float) -> Verdict:
    """At `temperature`, for 1, against half of it."""
    count, new = (4, 48) if lab.quick else (16, 128)
    plain = [_drawn(temperature, seed, count, new) for seed in SEEDS]
    sharp = [_drawn(0.5, seed, count, new) for seed in SEEDS]
    gaps = [a - b for losses, entropies in plain for a, b in zip(losses, entropies, strict=True)]
    gap, error = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    by_seed = [[statistics.fmean(losses) for losses, _ in found] for found in (plain, sharp)]
    numbers = {
        "loss of drawn tokens": spread(by_seed[0], "nats/token"),
        "loss of drawn tokens, temperature 0.5": spread(by_seed[1], "nats/token"),
        "loss less entropy": Measurement(gap, "nats/token", len(gaps), gap - 3 * error, gap + 3 * error, statistics.stdev(gaps)),
    }
    wrong = [] if abs(gap) <= 3 * error else [f"drawn tokens cost {gap:+.3f} nats against the model's entropy, over 3 standard errors"]
    wrong += [] if all(b < a for a, b in zip(*by_seed, strict=True)) else ["sharpened, the texts are no likelier"]
    return judged(wrong, numbers)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Texts drawn token by token cost what the model's entropy says, and less where its distribution is sharpened.",
        where=Paper("Graves", 2013, "arXiv:1308.0850", "sections 2 and 5.4"),
        scale="nano in fp32, 48 tokens after 64 of held-out text, 3 seeds of 4 texts each (in full 16 of 128 tokens)",
        check=partial(_calibrated, temperature=1.0),
        # as good as blind
        broken=partial(_calibrated, temperature=20.0),
    ),
)
