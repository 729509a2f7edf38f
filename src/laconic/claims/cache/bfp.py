"""Claims of block floating point with sorted key channels, against the same blocks in the order of the model and in a random one.

Heads of nano have 32 channels, so blocks are of 8, a fourth of a head as 32 are of 128. Loud channels are planted by powers of two: some
rotary pairs of each head of keys, drawn by the seed, their queries quieter by as much, which leaves every score as it was. Four pairs fill
a block; two fill half of one, so that four quiet channels stay beside them however channels are sorted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from laconic.claims.lab import ONE, SEEDS, attending, continued, judged, long_text, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.state import State, reordered
from laconic.methods.cache.store.bfp import Bfp, by_loudness
from laconic.methods.cache.store.full import Full
from laconic.runtime import key_loudness

BITS, BLOCK = 4, 8
LOUDER = 16.0

Make = Callable[[], State]
# the orders of a model's keys, given a seed
Order = Callable[[nn.Module, int], Make]


@lru_cache(maxsize=1)
def _loud(seed: int, pairs: int) -> nn.Module:
    """nano with loud key channels; it computes what nano does."""
    model: Any = copy.deepcopy(long_text()[0])
    generator, d = torch.Generator().manual_seed(seed), model.config.head_dim
    for layer in model.model.layers:
        keys, queries = (proj.weight.data.unflatten(0, (-1, d)) for proj in (layer.self_attn.k_proj, layer.self_attn.q_proj))
        for head in range(len(keys)):
            pair = torch.randperm(d // 2, generator=generator)[:pairs]
            served = slice(head * len(queries) // len(keys), (head + 1) * len(queries) // len(keys))
            for at in (pair, pair + d // 2):
                keys[head, at] *= LOUDER
                queries[served, at] /= LOUDER
    return model  # type: ignore[no-any-return]


FILLED, HALF = partial(_loud, pairs=4), partial(_loud, pairs=2)


def _trained(seed: int) -> nn.Module:
    return long_text()[0]


# ---- orders


def _sorted(model: nn.Module, seed: int) -> Make:
    return partial(Bfp, BITS, BLOCK)


def _stored(model: nn.Module, seed: int) -> Make:
    return partial(Bfp, BITS, BLOCK, sort=False)


def _random(model: nn.Module, seed: int) -> Make:
    g = torch.Generator().manual_seed(seed)
    orders = {i: by_loudness(torch.rand(loud.shape, generator=g)) for i, loud in enumerate(key_loudness(model)) if loud is not None}
    return partial(Bfp, BITS, BLOCK, sort=False, orders=orders)


def _dealt(model: nn.Module, seed: int) -> Make:
    """The stand-in: sorted, and then dealt out like cards, so that every block gets its share of loud ones."""
    orders = {
        i: by_loudness(loud).unflatten(1, (BLOCK, -1)).transpose(1, 2).flatten(1)
        for i, loud in enumerate(key_loudness(model))
        if loud is not None
    }
    return partial(Bfp, BITS, BLOCK, sort=False, orders=orders)


ORDERS: dict[str, Order] = {"as they come": _stored, "random": _random}


# ---- perplexity and scores


@lru_cache(maxsize=32)
def _loss(of: Callable[[int], nn.Module], order: Order | None, seed: int, quick: bool, bits: int = BITS) -> tuple[float, float]:
    """Loss of the tokens after a cached prompt, in nats, and bits a number of the cache; of rows that differ by seed."""
    model, count = of(seed), 2 if quick else 8
    rows = long_text()[1][seed * count : (seed + 1) * count]
    make: Make = Full if order is None else order(model, seed)
    if bits != BITS:
        make = partial(Bfp, bits, BLOCK, sort=False)
    found = continued(make, rows[:, :768] if quick else rows, 512 if quick else 1536, 32 if quick else 1, model)
    return float(found.nll.mean()), found.bits


def _score_error(model: nn.Module, make: Make) -> float:
    """Squared error of scores as a share of their squares, the mean over layers, of 512 tokens."""
    state, shares = make().fitted(key_loudness(model)), []

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state.append(layer, (key, key), None, None)
        state.commit(torch.tensor(state.waiting(layer)), layer)
        held, wide = state.seen(layer)[0].data, query.unflatten(1, (key.shape[1], -1)).float()
        exact, found = (torch.einsum("bkgtd,bksd->bkgts", wide, one.float()) for one in (key, held))
        shares.append(float((found - exact).square().sum() / exact.square().sum()))
        return query, key, value

    with torch.inference_mode(), attending(model, look):
        model(long_text()[1][-1:, :512], use_cache=False)
    return sum(shares) / len(shares)


def _closes(lab: Lab, of: Callable[[int], nn.Module], ours: Order, seeds: Sequence[int]) -> Verdict:
    seeds = lab.draws(seeds)
    full = [_loss(of, None, seed, lab.quick)[0] for seed in seeds]
    losses = {name: [_loss(of, order, seed, lab.quick) for seed in seeds] for name, order in {"sorted": ours, **ORDERS}.items()}
    errors = {name: [_score_error(of(s), order(of(s), s)) for s in seeds] for name, order in {"sorted": ours, **ORDERS}.items()}
    numbers = {"perplexity, full cache": spread([math.exp(loss) for loss in full], "")}
    wrong = []
    for name, found in losses.items():
        gaps = [loss - whole for (loss, _), whole in zip(found, full, strict=True)]
        numbers[f"perplexity, {name}"] = spread([math.exp(loss) for loss, _ in found], "")
        numbers[f"perplexity gap, {name}"] = spread([math.expm1(gap) for gap in gaps], "share")
        numbers[f"score error, {name}"] = spread(errors[name], "share")
        numbers[f"bits a number, {name}"] = spread([bits for _, bits in found], "bits")
        if name == "sorted":
            continue
        own = [loss - whole for (loss, _), whole in zip(losses["sorted"], full, strict=True)]
        closed = [1 - ours / theirs for ours, theirs in zip(own, gaps, strict=True)]
        numbers[f"share of the gap closed, {name}"] = spread(closed, "share")
        wrong += [f"{name}: the loss is no higher"] if any(a >= b for a, b in zip(own, gaps, strict=True)) else []
        wrong += [f"{name}: less than half of the gap is closed"] if any(a > b / 2 for a, b in zip(own, gaps, strict=True)) else []
        wrong += [f"{name}: scores err no more"] if any(a >= b for a, b in zip(errors["sorted"], errors[name], strict=True)) else []
    return judged(wrong, numbers)


def _as_good(lab: Lab, ours: Order, seeds: Sequence[int]) -> Verdict:
    """Sorted in 4 bits against 8 bits as they come, with planted channels."""
    seeds = lab.draws(seeds)
    narrow, wide = ([_loss(FILLED, order, s, lab.quick, bits) for s in seeds] for order, bits in ((ours, BITS), (_stored, 2 * BITS)))
    gap = [math.expm1(a - b) for (a, _), (b, _) in zip(narrow, wide, strict=True)]
    ratio = wide[0][1] / narrow[0][1]
    numbers = {
        "perplexity over that in 8 bits": spread(gap, "share"),
        "bytes, 8 bits / 4 bits": Measurement(ratio, "", 1),
    }
    wrong = [f"the perplexity is up to {max(gap):.1%} above that in 8 bits"] if max(gap) > 0.01 else []
    return judged(wrong + ([f"8 bits take {ratio:.2f} times the bytes only"] if ratio < 1.75 else []), numbers)


def _same(lab: Lab, queries: bool) -> Verdict:
    """Logits of a model whose keys, and with them queries, are sorted, and nothing is rounded."""
    model = FILLED(0)
    orders = [by_loudness(loud) for loud in key_loudness(model) if loud is not None]
    rows = long_text()[1][: 2 if lab.quick else 8, :512]
    with torch.inference_mode():
        exact = model(rows, use_cache=False).logits

        def sort(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return reordered(query, orders[layer]) if queries else query, reordered(key, orders[layer]), value

        with attending(model, sort):
            found = model(rows, use_cache=False).logits
    worst = float((found - exact).norm() / exact.norm())
    numbers = {"difference of logits, over their norm": Measurement(worst, "share", exact.numel())}
    return judged([] if worst <= 1e-5 else [f"the logits differ by {worst:.1e} of their norm"], numbers)


PAPER = Paper("Trukhanov and Soloveychik", 2024, "arXiv:2403.20137")
SCALE = (
    "nano in fp32, blocks of 8 of a head's 32 channels, 256 tokens after 512 cached ones of held-out text, 3 x 2 rows (in full 512 after "
)
SCALE += "1,536, 3 x 8 rows)"
PLANTED = ", four rotary pairs of each key head 16 times louder, 3 draws"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With loud key channels that fill blocks, sorting them closes at least half of the gap that 4-bit mantissas leave in the "
        "order of the model and in a random one, and scores err less.",
        where=PAPER,
        scale=SCALE + PLANTED,
        check=partial(_closes, of=FILLED, ours=_sorted, seeds=SEEDS),
        broken=partial(_closes, of=FILLED, ours=_dealt, seeds=ONE),
    ),
    Claim(
        says="With fewer loud key channels than a block holds, sorting them closes at least half of the gap too, and scores err less.",
        where=PAPER,
        scale=SCALE + PLANTED.replace("four", "two"),
        check=partial(_closes, of=HALF, ours=_sorted, seeds=SEEDS),
        broken=partial(_closes, of=HALF, ours=_dealt, seeds=ONE),
    ),
    Claim(
        says="On the model as trained too, sorting closes at least half of the gap that 4-bit mantissas leave in the order of the model "
        "and in a random one, and scores err less.",
        where=PAPER,
        scale=SCALE,
        check=partial(_closes, of=_trained, ours=_sorted, seeds=SEEDS),
        broken=partial(_closes, of=_trained, ours=_dealt, seeds=ONE),
    ),
    Claim(
        says="With loud key channels, 4 bits sorted stay within 1 % of the perplexity of 8 bits as they come, in about half of the bytes.",
        where=PAPER,
        scale=SCALE + PLANTED,
        check=partial(_as_good, ours=_sorted, seeds=SEEDS),
        broken=partial(_as_good, ours=_dealt, seeds=ONE),
    ),
    Claim(
        says="Sorted keys and queries, unrounded, give the same logits.",
        where=PAPER,
        scale="nano in fp32 with loud key channels, 2 x 512 tokens (in full 8 x 512)",
        check=partial(_same, queries=True),
        broken=partial(_same, queries=False),
    ),
)
