"""Claims of FlashSVD: the products' own results, in less memory the longer the input, in about the time."""

from __future__ import annotations

import statistics
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from laconic.artifact import put as put_module
from laconic.artifact import stand
from laconic.claims.lab import SEEDS, Bench, held, judged, long_text, on, spread, turns
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Held, Packed
from laconic.core.part import Part
from laconic.methods.factorize.lowrank.svd import SVD, Kept, product
from laconic.methods.factorize.stream.flashsvd import FlashSVD, StreamedAttention, StreamedFeed

SHARE = Kept(0.5)
# the sizes of a Qwen2 of 0.5 billion weights
SIZES = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
LAYERS, WORDS = 2, 1000
# how much less at the longest input, and how much longer it may take than the products one by one
LESS, SLOWER = 3.0, 1.5


class Apart(StreamedAttention):
    """The stand-in: each tile of tokens is attended to for itself."""

    def streamed(self, x: Tensor, turn: Any, mask: Tensor | None) -> Tensor:
        found = []
        for at in range(0, x.shape[1], self.tokens):
            some = slice(at, at + self.tokens)
            near = None if mask is None else mask[..., some, some]
            found.append(super().streamed(x[:, some], None if turn is None else (turn[0][:, some], turn[1][:, some]), near))
        return torch.cat(found, 1)


def held_as(model: nn.Module, forms: dict[str, Packed]) -> nn.Module:
    """Layers whose weight has a form hold it."""
    for name, form in forms.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        put_module(model, name.removesuffix(".weight"), Held(form, layer, bias))
    return model


# ---- the same results


def _same(bench: Bench, method: FlashSVD, kind: type[StreamedAttention]) -> Verdict:
    forms = held(bench, SVD(), SHARE)
    naive, ours = (held_as(bench.source.load(torch.float32), forms) for _ in range(2))
    places: dict[str, Part] = {}
    for edge in bench.source.anatomy.edges():
        places.update(method.opens(edge))
    parts = {path: kind(part.tokens) if isinstance(part, StreamedAttention) else part for path, part in places.items()}
    for path, part in parts.items():
        stand(ours, path, part)
    rows = long_text()[1]
    worst: dict[str, list[float]] = {"whole context": [], "two rows, one padded": []}
    with torch.inference_mode():
        for seed in SEEDS:
            one, two = rows[seed : seed + 1], rows[seed + 3 : seed + 5, :700]
            mask = torch.ones_like(two)
            mask[1, :123] = 0
            for name, words in (
                ("whole context", {"input_ids": one}),
                ("two rows, one padded", {"input_ids": two, "attention_mask": mask}),
            ):
                wanted, found = (model(**words, use_cache=False).logits.double() for model in (naive, ours))
                seen = torch.ones_like(wanted[..., 0]) if "attention_mask" not in words else mask
                apart = (found - wanted)[seen.bool()]
                worst[name].append(float(apart.norm() / wanted[seen.bool()].norm()))
    streamed = [part for part in parts.values() if isinstance(part, (StreamedFeed, StreamedAttention)) and part.sound]
    numbers = {f"{name}: logits apart, as a share of their norm": spread(values, "") for name, values in worst.items()}
    numbers["layers that run by tiles"] = Measurement(float(len(streamed)), "", len(parts))
    wrong = [f"{name}: logits differ by {max(values):.1e}" for name, values in worst.items() if not max(values) <= 1e-5]
    if len(streamed) != len(parts) or not parts:
        wrong.append("not every layer runs by tiles")
    return judged(wrong, numbers)


# ---- memory and time


@lru_cache(maxsize=4)
def _network(method: FlashSVD | None) -> nn.Module:
    """Layers of a real model's sizes with random products; streamed, or (None) as they are."""
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, num_hidden_layers=LAYERS, vocab_size=WORDS, max_position_embeddings=8192)  # type: ignore[arg-type]
    model = Qwen2Model(config).eval().requires_grad_(False)
    draw, forms = torch.Generator().manual_seed(0), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            (n, m), r = layer.weight.shape, SHARE.rank(*layer.weight.shape)
            forms[f"{name}.weight"] = product(torch.randn(n, r, generator=draw) / r**0.5, torch.randn(r, m, generator=draw) / m**0.5)
    held_as(model, forms)  # type: ignore[arg-type]
    for layer in range(LAYERS if method is not None else 0):
        stand(model, f"layers.{layer}.self_attn", StreamedAttention(method.tokens))  # type: ignore[union-attr]
        stand(model, f"layers.{layer}.mlp", StreamedFeed(method.tokens, method.neurons, method.stages))  # type: ignore[union-attr]
    return model


class Peak(NamedTuple):
    """Bytes: the most that tensors made by a pass had at once, and the largest of them."""

    together: int
    largest: int


def peak(run: Any) -> Peak:
    """What torch's allocator says while it runs, once it has run before."""
    with torch.inference_mode():
        run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run()
    # what is taken is positive, what is given back negative
    told = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    live = most = largest = 0
    for event in sorted(told, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most, largest = max(most, live), max(largest, event.nbytes())
    return Peak(most, largest)


def _run(method: FlashSVD | None, tokens: int) -> Any:
    model, ids = _network(method), torch.randint(0, WORDS, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return lambda: model(ids, use_cache=False).last_hidden_state


def _lengths(lab: Lab) -> tuple[int, ...]:
    return (512, 1024, 2048, 4096) if lab.quick else (512, 1024, 2048, 4096, 8192)


def _smaller(lab: Lab, methods: tuple[FlashSVD, ...]) -> Verdict:
    numbers: dict[str, Measurement] = {}
    wrong: list[str] = []
    lengths = _lengths(lab)
    plain = [peak(_run(None, t)) for t in lengths]
    for method in methods:
        ours = [peak(_run(method, t)) for t in lengths]
        name = f"{method.stages} stage" + "s" * (method.stages - 1)
        ratios = [a.together / b.together for a, b in zip(plain, ours, strict=True)]
        for t, a, b, ratio in zip(lengths, plain, ours, ratios, strict=True):
            numbers[f"{t} tokens, as they are: at once"] = Measurement(a.together / 1e6, "MB", 1)
            numbers[f"{t} tokens, {name}: at once"] = Measurement(b.together / 1e6, "MB", 1)
            numbers[f"{t} tokens, {name}: times less at once"] = Measurement(ratio, "", 1)
            numbers[f"{t} tokens, {name}: times less, the largest tensor"] = Measurement(a.largest / b.largest, "", 1)
        if ratios[-1] < LESS or plain[-1].largest < LESS * ours[-1].largest:
            wrong.append(f"{name}: activations of {lengths[-1]} tokens are not {LESS:g} times smaller")
        if any(a >= b for a, b in pairwise(ratios)):
            wrong.append(f"{name}: the ratio does not grow with the length")
    return judged(wrong, numbers)


def _quick(lab: Lab, methods: tuple[FlashSVD, ...]) -> Verdict:
    numbers: dict[str, Measurement] = {}
    wrong: list[str] = []
    for tokens in (1024,) if lab.quick else (1024, 4096):
        took = turns([_run(method, tokens) for method in (None, *methods)], 5)
        for method, times in zip(methods, took[1:], strict=True):
            ratios = [ours / plain for ours, plain in zip(times, took[0], strict=True)]
            numbers[f"{tokens} tokens, {method.stages} of the stages: times as long as the products one by one"] = spread(ratios, "")
            if statistics.median(ratios) > SLOWER:
                wrong.append(f"{tokens} tokens take over {SLOWER:g} times as long")
    return judged(wrong, numbers)


def _exact(method: FlashSVD, kind: type[StreamedAttention], lab: Lab) -> Verdict:
    return on(lab, "nano", lambda bench: _same(bench, method, kind))


PAPER = Paper("Shao et al.", 2025, "arXiv:2508.01506")
BOTH = (FlashSVD(stages=1), FlashSVD(stages=2))
SCALE = (
    f"{LAYERS} layers of the sizes of Qwen2 0.5B with random factors of half the numbers, fp32, forward pass without a cache; memory as "
    "torch's allocator counts it"
)
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Logits are those of the products one by one to rounding, over a whole context and with padding, in tiles that end anywhere.",
        where=PAPER,
        scale="nano in products of half the numbers, 2,048 tokens and 2 rows of 700, tiles of 100, 3 draws; the stand-in's do not meet",
        check=partial(_exact, FlashSVD(tokens=100, neurons=90, stages=2), StreamedAttention),
        broken=partial(_exact, FlashSVD(tokens=100, neurons=90, stages=2), Apart),
    ),
    Claim(
        says="Activations take at least 3 times less memory at 4,096 tokens, and the ratio grows with the length.",
        where=PAPER,
        scale=f"{SCALE}; 512 to 4,096 tokens (in full 8,192); the stand-in has one tile",
        check=partial(_smaller, methods=BOTH),
        broken=partial(_smaller, methods=(FlashSVD(tokens=1 << 20, neurons=1 << 20),)),
        timed=True,
    ),
    Claim(
        says="A pass takes at most 1.5 times as long as one of the products one by one.",
        where=PAPER,
        scale=f"{SCALE}; 1,024 tokens (in full also 4,096), in turns; the stand-in has tiles of 8 tokens",
        check=partial(_quick, methods=BOTH),
        broken=partial(_quick, methods=(FlashSVD(tokens=8, neurons=32),)),
        timed=True,
    ),
)
