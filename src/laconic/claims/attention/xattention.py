"""Claims of XAttention: what antidiagonals find, in heads of a model and where lines were planted, and what leaving blocks out saves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from laconic.claims.lab import ONE, SEEDS, judged, on, spread, turns
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.state import Pattern
from laconic.kernels.blocks import block_attention, causal_attention, visible
from laconic.methods.attention.sparse.xattention import XAttention, antidiagonal
from laconic.runtime import attend_by

TOKENS, BLOCK, STRIDE = 2048, 64, 8
TAUS = (0.8, 0.9)
# one head: query, key, value, each (t, d)
Head = tuple[Tensor, Tensor, Tensor]
Scores = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Recorded(Pattern):
    """Keeps every block, and the queries that it is asked about."""

    block: int = BLOCK
    queries: list[Tensor] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        self.queries.append(query)
        return visible(query.shape[2], key.shape[2], self.block)[0].expand(*query.shape[:2], -1, -1)


def of_nano(bench: Any, row: int, layers: Sequence[int]) -> list[Head]:
    """All heads of some layers, over a text of 2,048 tokens."""

    def make() -> list[Head]:
        model = bench.source.load(torch.float32)
        ids = bench.certify.inputs.flatten()[row * TOKENS : (row + 1) * TOKENS][None]
        seen, cache = Recorded(), DynamicCache(config=model.config)
        attend_by(model, seen)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        found = []
        for layer in layers:
            held: Any = cache.layers[layer]
            keys, values = held.keys[0], held.values[0]
            for head, query in enumerate(seen.queries[layer][0]):
                served = head // (len(seen.queries[layer][0]) // len(keys))
                found.append((query, keys[served], values[served]))
        return found

    heads: list[Head] = bench.once(("heads", row, tuple(layers)), make)
    return heads


def planted(seed: int, d: int = 64, t: int = TOKENS) -> list[Head]:
    """Two heads of noise (scores of deviation 1/4), one with vertical lines (tokens that all look at), one with slash lines (all look as
    far back), whose scores are 10."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for slash in (False, True):
        query, key, value = (torch.randn(t, d, generator=draw) * size for size in (0.5, 0.5, 1.0))
        for _ in range(3):
            at, loud = int(torch.randint(t // 4, (1,), generator=draw)) + t // 16, (10 * math.sqrt(d)) ** 0.5
            if slash:
                mark = F.normalize(torch.randn(t, d, generator=draw), dim=1) * loud
                key, query = key + mark, query + mark.roll(at, 0)
            else:
                mark = F.normalize(torch.randn(d, generator=draw), dim=0)
                key[at] += mark * loud
                query = query + mark * loud
        made.append((query, key, value))
    return made


def by_means(query: Tensor, key: Tensor) -> Tensor:
    """The mean query of a block times the mean key of one, as shares."""
    means = [F.pad(x, (0, 0, 0, -len(x) % BLOCK)).unflatten(0, (-1, BLOCK)).mean(1) for x in (query, key)]
    seen = visible(len(query), len(key), BLOCK)[0]
    return (means[0] @ means[1].T / math.sqrt(query.shape[1])).masked_fill(~seen, -torch.inf).softmax(-1)


def by_chance(query: Tensor, key: Tensor) -> Tensor:
    """Any order."""
    return torch.rand(-(-len(query) // BLOCK), -(-len(key) // BLOCK), generator=torch.Generator().manual_seed(len(key)))


def by_antidiagonals(query: Tensor, key: Tensor) -> Tensor:
    """What XAttention scores by."""
    return antidiagonal(query, key, STRIDE, BLOCK, query.shape[1] ** -0.5)


def astray(query: Tensor, key: Tensor) -> Tensor:
    """A stand-in: each block has the score of the one before it."""
    return by_antidiagonals(query, key).roll(1, 1)


def as_many(scores: Tensor, like: Tensor) -> Tensor:
    """The blocks of greatest score, in each row as many as `like` has: its own block and the first one among them."""
    seen, own = visible(len(scores) * BLOCK, scores.shape[1] * BLOCK, BLOCK)
    forced = own.clone()
    forced[:, 0] = True
    order = scores.masked_fill(~seen, -torch.inf).masked_fill(forced, torch.inf).argsort(1, descending=True).argsort(1)
    return order < like.sum(1, keepdim=True)


def dense(head: Head) -> tuple[Tensor, Tensor]:
    """Causal attention of a head: its weights (t, t) and its output."""
    query, key, value = head
    scores = query @ key.T / math.sqrt(query.shape[1])
    weights = scores.masked_fill(~torch.ones(scores.shape, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    return weights, weights @ value


def worth(head: Head, known: tuple[Tensor, Tensor], kept: Tensor) -> tuple[float, float]:
    """The share of attention that lies in the kept blocks, a mean over queries, and the error of the output as a share of its norm."""
    (weights, whole), t = known, len(head[0])
    inside = weights * kept.repeat_interleave(BLOCK, 0)[:t].repeat_interleave(BLOCK, 1)[:, :t]
    mass = inside.sum(1, keepdim=True)
    return float(mass.mean()), float((inside / mass @ head[2] - whole).norm() / whole.norm())


def compared(draws: Sequence[list[Head]], ours: Scores) -> tuple[list[str], dict[str, Measurement]]:
    """More of the attention, and a lower error, than as many blocks by means and by chance, at each share."""
    numbers: dict[str, Measurement] = {}
    wrong: list[str] = []
    ways: dict[str, Scores] = {"antidiagonals": ours, "means": by_means, "chance": by_chance}
    known = [[(head, dense(head)) for head in heads] for heads in draws]
    for tau in TAUS:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        density = []
        for heads in known:
            each: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for head, right in heads:
                like = XAttention(tau, STRIDE, BLOCK)(head[0][None, None], head[1][None, None])[0, 0]
                density.append(float(like.sum() / visible(len(head[0]), len(head[1]), BLOCK)[0].sum()))
                for name, way in ways.items():
                    each[name].append(worth(head, right, as_many(way(head[0], head[1]), like)))
            for name, values in each.items():
                mass, error = zip(*values, strict=True)
                found[name].append((statistics.fmean(mass), statistics.fmean(error)))
        numbers[f"tau {tau}: blocks kept"] = spread(density, "")
        for name, pairs in found.items():
            numbers[f"tau {tau}, {name}: attention kept"] = spread([mass for mass, _ in pairs], "")
            numbers[f"tau {tau}, {name}: error of the output"] = spread([error for _, error in pairs], "")
        for name in ("means", "chance"):
            if any(a[0] <= b[0] or a[1] >= b[1] for a, b in zip(found["antidiagonals"], found[name], strict=True)):
                wrong.append(f"at {tau} antidiagonals are not ahead of {name}")
    return wrong, numbers


def _real(ours: Scores, lab: Lab) -> Verdict:
    layers = (1, 4, 7) if lab.quick else range(8)
    rows = ONE if ours is astray else lab.draws(SEEDS)
    return on(lab, "nano", lambda bench: judged(*compared([of_nano(bench, row, layers) for row in rows], ours)))


def _planted(ours: Scores, lab: Lab) -> Verdict:
    return judged(*compared([planted(seed) for seed in SEEDS], ours))


def _whole(tau: float, lab: Lab) -> Verdict:
    worst = 0.0
    for seed in SEEDS:
        for query, key, value in planted(seed, t=700):
            q, k, v = (x[None, None] for x in (query, key, value))
            found = block_attention(q, k, v, XAttention(tau, STRIDE, BLOCK)(q, k), BLOCK)
            right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            worst = max(worst, float((found - right).norm() / right.norm()))
    numbers = {"greatest difference, as a share of the norm": Measurement(worst, "", 2 * len(SEEDS))}
    return judged([] if worst < 1e-5 else [f"results differ by {worst:.2g}"], numbers)


def _faster(broken: bool, lab: Lab) -> Verdict:
    """A prompt of 8,192 tokens, 4 heads of 64: blocks by chance, against dense attention, ours or torch's, whichever is quicker."""
    t, block, draw = 8192, 128, torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, t, 64, generator=draw) for _ in range(3))
    seen, own = visible(t, t, block)
    numbers: dict[str, Measurement] = {}
    wrong: list[str] = []
    for density in (0.1, 0.2, 0.3):
        keep = ((torch.rand(1, 4, *seen.shape, generator=draw) < density) | own) & seen
        share = float(keep.float().sum() / (4 * seen.sum()))
        done = seen.expand(1, 4, -1, -1) if broken else keep
        runs = (
            partial(F.scaled_dot_product_attention, query, key, value, is_causal=True),
            partial(causal_attention, query, key, value),
            partial(block_attention, query, key, value, done, block),
        )
        ratios = [ours / min(dense) for *dense, ours in zip(*turns(runs, 3 if lab.quick else 9), strict=True)]
        numbers[f"{share:.0%} of the blocks: time, as a share of dense attention's"] = spread(ratios, "")
        if statistics.median(ratios) > 1.5 * share:
            wrong.append(f"{share:.0%} of the blocks take over {1.5 * share:.0%} of the time")
    return judged(wrong, numbers)


PAPER = Paper("Xu et al.", 2025, "arXiv:2503.16428", "sections 2.1 and 2.2")
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With as many blocks, antidiagonals keep more attention and err less than means of blocks and chance, in heads of a model.",
        where=PAPER,
        scale="all heads of 3 layers of nano (in full 8), 3 texts of 2,048 tokens, blocks of 64, stride 8, tau 0.8 and 0.9",
        check=partial(_real, by_antidiagonals),
        broken=partial(_real, astray),
    ),
    Claim(
        says="With as many blocks, antidiagonals keep more and err less where vertical and slash lines were planted in noise.",
        where=PAPER,
        scale="2 heads of 64, 2,048 tokens, 3 lines each, blocks of 64, stride 8, tau 0.8 and 0.9, 3 seeds",
        check=partial(_planted, by_antidiagonals),
        broken=partial(_planted, astray),
    ),
    Claim(
        says="With tau = 1 the result is dense attention.",
        where=PAPER,
        scale="2 heads of 64, 700 tokens, 3 seeds",
        check=partial(_whole, 1.0),
        broken=partial(_whole, 0.5),
    ),
    Claim(
        says="Below 30 % of the blocks, time falls with their share.",
        where=PAPER,
        scale="8,192 tokens, 4 heads of 64, fp32, blocks of 128 by chance; at most 1.5 times their share, of the quicker dense attention",
        check=partial(_faster, False),
        broken=partial(_faster, True),
        timed=True,
    ),
)
