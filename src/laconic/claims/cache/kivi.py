"""Claims of KIVI: what 2 bits cost in perplexity, that its axes are the right ones, and how little memory it takes."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from laconic.claims.lab import SEEDS, Continued, Misread, continued, judged, long_text, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.state import State
from laconic.measurement import peak_memory
from laconic.methods.cache.store.full import Full
from laconic.methods.cache.store.kivi import Kivi
from laconic.runtime import StateCache

PROMPT = 1536


# the stand-in: each group is read with the zero of the group before it
MISPLACED = partial(Misread, Kivi(), "zeros")


# ---- perplexity


@lru_cache(maxsize=16)
def _after(make: Callable[[], State], quick: bool) -> Continued:
    """The 512 tokens after PROMPT cached ones: of four rows a seed, in full of eight, each row another."""
    count, piece = (4, 32) if quick else (8, 1)
    return continued(make, long_text()[1][: len(SEEDS) * count], PROMPT, piece)


def _by_seed(found: Continued) -> list[float]:
    """Mean loss of each seed's rows."""
    return [float(part.mean()) for part in found.nll.chunk(len(SEEDS))]


def _gap(found: Continued, full: Continued) -> float:
    """How much greater the perplexity is than the full cache's, as a share of it, over all tokens."""
    return math.expm1(float((found.nll - full.nll).mean()))


def _numbers(found: Mapping[str, Continued], full: Continued) -> dict[str, Measurement]:
    numbers = {}
    for name, one in {"full": full, **found}.items():
        numbers[f"perplexity, {name}"] = spread([math.exp(loss) for loss in _by_seed(one)], "")
        numbers[f"bytes, {name}"] = Measurement(float(one.bytes), "bytes", one.nll.shape[0])
        numbers[f"bits a number, {name}"] = Measurement(one.bits, "bits", one.nll.shape[0])
        if one is not full:
            numbers[f"perplexity gap, {name}"] = Measurement(_gap(one, full), "share", one.nll.numel())
            gaps = [math.expm1(a - b) for a, b in zip(_by_seed(one), _by_seed(full), strict=True)]
            numbers[f"perplexity gap by seed, {name}"] = spread(gaps, "share")
    return numbers


# every cell of the paper's table of axes is one maker, so that each is measured once
AXES = {
    "keys per token, values per token": partial(Kivi, keys="token", values="token"),
    "keys per channel, values per channel": partial(Kivi, keys="channel", values="channel"),
    "keys per token, values per channel": partial(Kivi, keys="token", values="channel"),
}
NEAREST = "keys per token, values per token"


def _near_full(lab: Lab, make: Callable[[], State], bits: int, bound: float) -> Verdict:
    full, ours = _after(Full, lab.quick), _after(make, lab.quick)
    gap = _gap(ours, full)
    wrong = [] if gap <= bound else [f"the perplexity is {gap:.1%} above that of the full cache"]
    return judged(wrong, _numbers({f"{bits} bits": ours}, full))


def _axes(lab: Lab, make: Callable[[], State], others: Sequence[str]) -> Verdict:
    """Against the same code with other axes, in at least as many bytes."""
    full, ours = _after(Full, lab.quick), _after(make, lab.quick)
    found = {name: _after(AXES[name], lab.quick) for name in others}
    numbers = _numbers({"keys per channel, values per token": ours, **found}, full)
    wrong = [f"{name}: the loss is no higher" for name, one in found.items() if float(ours.nll.mean()) >= float(one.nll.mean())]
    # round to nearest per token keeps a full residual of keys, so it never has fewer bytes
    wrong += [f"{name}: holds fewer bytes" for name, one in found.items() if name == NEAREST and one.bytes < ours.bytes]
    return judged(wrong, numbers)


# ---- memory


def _held(make: Callable[[], State], tokens: int, answer: Any) -> None:
    """In a process of its own: (bytes of weights, bytes of the state, bits a number, how far the peak lies above where it began)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=16, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    cache, begun = StateCache(model, make()), peak_memory()
    with torch.inference_mode():
        for at in range(0, tokens, 256):
            model.model(torch.randint(0, 256, (1, min(256, tokens - at))), past_key_values=cache)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    answer.put((weights, cache.state.nbytes, cache.state.bits_per_number, peak_memory() - begun))


def _memory(lab: Lab, make: Callable[[], State]) -> Verdict:
    tokens = 4096 if lab.quick else 16384
    context = multiprocessing.get_context("spawn")
    numbers: dict[str, Measurement] = {}
    found = {}
    for name, maker in (("full", Full), ("2 bits", make)):
        answer = context.SimpleQueue()
        process = context.Process(target=_held, args=(maker, tokens, answer))
        process.start()
        process.join()
        if process.exitcode:
            return Verdict("cannot be checked here", numbers, f"the process with the cache '{name}' ended with {process.exitcode}")
        weights, held, bits, peak = found[name] = answer.get()
        numbers[f"bytes, {name}"] = Measurement(float(held), "bytes", 1)
        numbers[f"bits a number, {name}"] = Measurement(bits, "bits", 1)
        numbers[f"peak above the model alone, {name}"] = Measurement(float(peak), "bytes", 1)
        numbers[f"weights and peak, {name}"] = Measurement(float(weights + peak), "bytes", 1)
    # tokens are a multiple of the residual: all keys are codes, values keep 128 tokens in 32 bits
    expected = 3 + (32 - 3) * 128 / tokens / 2
    wrong = [] if abs(found["2 bits"][2] - expected) < 1e-6 else [f"a number takes {found['2 bits'][2]:.4f} bits, not {expected:.4f}"]
    ratio = (found["full"][0] + found["full"][3]) / (found["2 bits"][0] + found["2 bits"][3])
    numbers["weights and peak, full / 2 bits"] = Measurement(ratio, "", 1)
    if ratio < 2:
        wrong.append(f"the peak with weights falls by a factor of {ratio:.2f} only")
    return judged(wrong, numbers)


SCALE = "nano in fp32, groups of 32, residual of 128; 512 tokens after 1,536 of held-out text, 12 rows by 32 tokens (in full 24, by one)"
PAPER = Paper("Liu et al.", 2024, "arXiv:2402.02750", "section 4.2")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At 2 bits the perplexity of the tokens that follow stays within 3 % of the full cache's.",
        where=PAPER,
        scale=SCALE,
        check=partial(_near_full, make=Kivi, bits=2, bound=0.03),
        broken=partial(_near_full, make=MISPLACED, bits=2, bound=0.03),
    ),
    Claim(
        says="At 4 bits the perplexity of the tokens that follow stays within 1 % of the full cache's.",
        where=PAPER,
        scale=SCALE,
        check=partial(_near_full, make=partial(Kivi, bits=4), bits=4, bound=0.01),
        broken=partial(_near_full, make=partial(Misread, Kivi(bits=4), "zeros"), bits=4, bound=0.01),
    ),
    Claim(
        says="At 2 bits keys per channel and values per token lose less than round to nearest per token in no fewer bytes.",
        where=Paper("Liu et al.", 2024, "arXiv:2402.02750", "section 3.1, table 2"),
        scale=SCALE,
        check=partial(_axes, make=Kivi, others=(NEAREST,)),
        broken=partial(_axes, make=MISPLACED, others=(NEAREST,)),
    ),
    Claim(
        says="At 2 bits keys per channel and values per token lose less than each other choice of axes in the same groups and residual.",
        where=Paper("Liu et al.", 2024, "arXiv:2402.02750", "section 3.1, table 2"),
        scale=SCALE,
        check=partial(_axes, make=Kivi, others=tuple(AXES)),
        broken=partial(_axes, make=MISPLACED, others=tuple(AXES)),
    ),
    Claim(
        says="At 2 bits a number takes 3 bits beyond the residual; where the cache is most of it, the peak with weights at least halves.",
        where=Paper("Liu et al.", 2024, "arXiv:2402.02750", "section 4.3"),
        scale="a random Llama of 16 layers of width 128 in fp32, 4,096 tokens (in full 16,384) in pieces of 256, one process each",
        check=partial(_memory, make=Kivi),
        broken=partial(_memory, make=Full),
    ),
)
