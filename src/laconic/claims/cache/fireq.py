"""Claims of FireQ's cache: keys scaled before and after the turn, against either alone and none, all in 4 bits with a scale a token and
head.

Keys are made as large models have them: on the slowest pairs of each head one channel gets an offset, which positions hardly turn, so that
it is loud and its mate is not; and some other pairs are louder, their queries quieter by as much. The offsets change the function a little,
so every model is compared with itself, unrounded. As trained, nano has no such keys."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, attending, continued, judged, long_text, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.site import Linear, Site
from laconic.core.statistic import Seen
from laconic.methods.cache.store.fireq import FireQ, followed
from laconic.methods.cache.store.full import Full
from laconic.methods.quantize.smooth.fireq import Radii, paired
from laconic.runtime import key_peaks

# pairs with an offset, how large that is in median radii of the head, and how many other pairs are louder by what
OFFSETS, SIZE, PAIRS, LOUDER = 2, 8.0, 4, 4.0
TOP = FireQ().top_k


def _layers(model: nn.Module) -> list[Any]:
    return list(model.model.layers)  # type: ignore[union-attr, arg-type]


def _calibration() -> Tensor:
    """Rows that nothing is measured on."""
    return long_text()[1][-2:, :1024]


def _radii(model: nn.Module) -> list[Tensor]:
    """Of each layer the greatest radii of its keys' pairs, (k, d)."""
    d = int(model.config.head_dim)  # type: ignore[union-attr, arg-type]
    found, hooks = {}, []
    for i, layer in enumerate(_layers(model)):
        kind, site = Radii(d, d // 2), Site("keys", Linear(), {}, tuple(layer.self_attn.k_proj.weight.shape))

        def look(module: nn.Module, args: Any, out: Tensor, i: int = i, kind: Radii = kind, site: Site = site) -> None:
            found[i] = kind.update(kind.init(site), Seen(y=out.flatten(0, 1))).unflatten(0, (-1, d))

        hooks.append(layer.self_attn.k_proj.register_forward_hook(look))
    with torch.inference_mode():
        model(_calibration(), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return [found[i].clone() for i in range(len(found))]


def _scaled(layer: Any, by: Tensor) -> None:
    """Rows of keys (k, d) times factors, those of their queries divided."""
    keys, queries = layer.self_attn.k_proj, layer.self_attn.q_proj
    with torch.no_grad():
        keys.weight.mul_(by.reshape(-1, 1))
        if keys.bias is not None:
            keys.bias.mul_(by.flatten())
        queries.weight.div_(by.repeat_interleave(queries.out_features // keys.out_features, 0).reshape(-1, 1))


@lru_cache(maxsize=3)
def _planted(seed: int) -> nn.Module:
    """nano with loud keys."""
    model, generator = copy.deepcopy(long_text()[0]), torch.Generator().manual_seed(seed)
    for layer, radii in zip(_layers(model), _radii(model), strict=True):
        k, d = radii.shape
        half, level = d // 2, radii.median(1).values
        offset, by = torch.zeros(k, d), torch.ones(k, d)
        for head in range(k):
            for pair in range(half - OFFSETS, half):
                side, sign = torch.randint(0, 2, (2,), generator=generator).tolist()
                offset[head, pair + half * side] = (2 * sign - 1) * SIZE * level[head]
            louder = torch.randperm(half - OFFSETS, generator=generator)[:PAIRS]
            by[head, louder], by[head, louder + half] = LOUDER, LOUDER
        _scaled(layer, by)
        layer.self_attn.k_proj.bias = nn.Parameter(offset.flatten())
    return model


def _trained(seed: int) -> nn.Module:
    return long_text()[0]


Of = Callable[[int], nn.Module]


class Way(NamedTuple):
    """Whether pairs are scaled before the turn, all but those `left`, and how many after it; `astray`: the wrong way round."""

    before: bool
    left: int
    after: int
    astray: bool = False


BOTH, ASTRAY = Way(True, TOP, TOP), Way(True, TOP, TOP, astray=True)
EITHER = {"before the turn alone": Way(True, 0, 0), "after the turn alone": Way(False, 0, TOP)}
NONE = Way(False, 0, 0)


@lru_cache(maxsize=32)
def _made(of: Of, way: Way, seed: int) -> tuple[nn.Module, FireQ]:
    """The model as it is rewritten, and an empty cache for it."""
    model = of(seed)
    if way.before:
        model = copy.deepcopy(model)
        for layer, radii in zip(_layers(model), _radii(model), strict=True):
            by = paired(radii, radii.shape[1] // 2, 1.0, way.left)
            _scaled(layer, 1 / by if way.astray else by)
    peaks = enumerate(key_peaks(model, _calibration())) if way.after else ()
    factors = {i: followed(*one, way.after, 1.0) for i, one in peaks if one is not None}
    return model, FireQ(top_k=0, factors={i: 1 / by if way.astray else by for i, by in factors.items()})


@lru_cache(maxsize=64)
def _errors(of: Of, way: Way, seed: int, quick: bool) -> tuple[float, float]:
    """Squared error of keys, and of what attention gives, as shares of their squares, the mean over layers."""
    model, state = _made(of, way, seed)
    shares: list[tuple[float, float]] = []

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache = FireQ(top_k=0, factors=state.factors)
        cache.append(layer, (key, key), None, None)
        cache.commit(torch.tensor(cache.waiting(layer)), layer)
        held, t = cache.seen(layer)[0].data, query.shape[2]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        outs = []
        for keys in (key, held):
            scores = torch.einsum("bkgtd,bksd->bkgts", query.unflatten(1, (key.shape[1], -1)), keys) / math.sqrt(key.shape[-1])
            outs.append(scores.masked_fill(~causal, -torch.inf).softmax(-1) @ value[:, :, None])
        share = [float((b - a).square().sum() / a.square().sum()) for a, b in ((key, held), outs)]
        shares.append((share[0], share[1]))
        return query, key, value

    rows = long_text()[1][seed : seed + (1 if quick else 4), : 512 if quick else 1024]
    with torch.inference_mode(), attending(model, look):
        model(rows, use_cache=False, logits_to_keep=1)
    keys, outs = (sum(column) / len(column) for column in zip(*shares, strict=True))
    return keys, outs


def _below(lab: Lab, of: Of, ours: Way, which: int, seeds: Sequence[int]) -> Verdict:
    """Errors of keys (0) or of attention's output (1) with both, below those of either alone and of none."""
    what = ("key error", "error of attention's output")[which]
    seeds = lab.draws(seeds)
    found = {
        name: [_errors(of, way, seed, lab.quick)[which] for seed in seeds] for name, way in {"both": ours, **EITHER, "none": NONE}.items()
    }
    numbers = {f"{what}, {name}": spread(errors, "share") for name, errors in found.items()}
    wrong = [
        f"{what}: both is not below {name}"
        for name, errors in found.items()
        if name != "both" and any(a >= b for a, b in zip(found["both"], errors, strict=True))
    ]
    return judged(wrong, numbers)


def _nearest(lab: Lab, of: Of, ours: Way, seeds: Sequence[int]) -> Verdict:
    """Loss of the tokens after a cached prompt, over that with the full cache."""
    count, length, prompt, piece = (2, 768, 512, 32) if lab.quick else (8, 2048, 1536, 1)
    numbers: dict[str, Measurement] = {}
    gaps: dict[str, list[float]] = {}
    for name, way in {"both": ours, "none": NONE}.items():
        gaps[name], bits = [], []
        for seed in lab.draws(seeds):
            model, state = _made(of, way, seed)
            rows = long_text()[1][seed * count : (seed + 1) * count, :length]
            full = continued(Full, rows, prompt, piece, model)
            found = continued(partial(FireQ, top_k=0, factors=state.factors), rows, prompt, piece, model)
            gaps[name].append(float(found.nll.mean() - full.nll.mean()))
            bits.append(found.bits)
        numbers[f"rise of perplexity, {name}"] = spread([math.expm1(gap) for gap in gaps[name]], "share")
        numbers[f"bits a number, {name}"] = spread(bits, "bits")
    wrong = ["the loss is no nearer to the full cache's"] if any(a >= b for a, b in zip(gaps["both"], gaps["none"], strict=True)) else []
    return judged(wrong, numbers)


PAPER = Paper("Baek et al.", 2025, "arXiv:2505.20839")
SCALE = "nano in fp32, a scale a token and head of 32 channels, 512 held-out tokens (in full 4 x 1,024)"
LOUD = (
    f"; offsets of {SIZE:g} median radii on one channel of the {OFFSETS} slowest pairs of each head, {PAIRS} other pairs {LOUDER:g} times "
)
LOUD += "louder, 3 draws"
TEXTS = "; 3 texts"
CACHED = (
    "nano in fp32, a scale a token and head of 32 channels, 256 tokens after 512 cached ones, 2 rows a draw (in full 512 after 1,536, 8)"
)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With loud keys, keys err less with both factors, before and after the turn, than with either and with none.",
        where=PAPER,
        scale=SCALE + LOUD,
        check=partial(_below, of=_planted, ours=BOTH, which=0, seeds=SEEDS),
        broken=partial(_below, of=_planted, ours=ASTRAY, which=0, seeds=ONE),
    ),
    Claim(
        says="With loud keys, what attention gives errs less with both factors, before and after the turn, than with either and with none.",
        where=PAPER,
        scale=SCALE + LOUD,
        check=partial(_below, of=_planted, ours=BOTH, which=1, seeds=SEEDS),
        broken=partial(_below, of=_planted, ours=ASTRAY, which=1, seeds=ONE),
    ),
    Claim(
        says="On the model as trained, keys err less with both factors, before and after the turn, than with either and with none.",
        where=PAPER,
        scale=SCALE + TEXTS,
        check=partial(_below, of=_trained, ours=BOTH, which=0, seeds=SEEDS),
        broken=partial(_below, of=_trained, ours=ASTRAY, which=0, seeds=ONE),
    ),
    Claim(
        says="On the model as trained, what attention gives errs less with both factors, before and after the turn, than with either "
        "and with none.",
        where=PAPER,
        scale=SCALE + TEXTS,
        check=partial(_below, of=_trained, ours=BOTH, which=1, seeds=SEEDS),
        broken=partial(_below, of=_trained, ours=ASTRAY, which=1, seeds=ONE),
    ),
    Claim(
        says="With loud keys, keys and values in 4 bits with both factors cost less perplexity than without, in as many bytes.",
        where=PAPER,
        scale=CACHED + LOUD,
        check=partial(_nearest, of=_planted, ours=BOTH, seeds=SEEDS),
        broken=partial(_nearest, of=_planted, ours=ASTRAY, seeds=ONE),
    ),
    Claim(
        says="On the model as trained, keys and values in 4 bits with both factors cost less perplexity than without, in as many bytes.",
        where=PAPER,
        scale=CACHED + TEXTS,
        check=partial(_nearest, of=_trained, ours=BOTH, seeds=SEEDS),
        broken=partial(_nearest, of=_trained, ours=ASTRAY, seeds=ONE),
    ),
)
