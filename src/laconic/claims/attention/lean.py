"""Claims of LeanAttention: nothing is approximated, and no worker has more than its share."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor

from laconic.claims.lab import judged, long_text, turns
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.state import Ragged, Run, State
from laconic.kernels.attention import Plain, attention, held_attention
from laconic.kernels.native import native
from laconic.kernels.threads import threads
from laconic.methods.attention.exact.lean import Lean
from laconic.methods.cache.store.full import Full
from laconic.runtime import StateCache

Share = Callable[[Sequence[int], int], list[Run]]
WORKERS = (1, 2, 3, 5, 8)


def by_pair(tiles: Sequence[int], workers: int) -> list[Run]:
    """FlashAttention-2's shares in decoding: a pair is one worker's, pairs are dealt out in turn."""
    return [Run(pair % workers, pair, 0, count) for pair, count in enumerate(tiles) if count]


def fixed_split(tiles: Sequence[int], workers: int) -> list[Run]:
    """FlashDecoding's: every pair in as many pieces of one length as give every worker one, dealt out in turn."""
    pieces = -(-workers // max(1, len(tiles)))
    runs = []
    for pair, count in enumerate(tiles):
        step = -(-max(tiles) // pieces)
        runs += [(pair, at, min(at + step, count)) for at in range(0, count, step)]
    return [Run(i % workers, *run) for i, run in enumerate(runs)]


def forgetful(tiles: Sequence[int], workers: int) -> list[Run]:
    """A stand-in: whoever begins within a pair begins a tile late."""
    return [run._replace(first=run.first + bool(run.first)) for run in Lean()(tiles, workers)]


# ---- exactness


@dataclass(eq=False)
class Watched(State):
    """What `inner` keeps; and queries with what they were asked over."""

    inner: State
    asked: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def keep(self, kept: Mapping[str, Ragged] | None, new: tuple[Ragged, ...]) -> Mapping[str, Ragged]:
        return self.inner.keep(kept, new)

    def read(self, kept: Mapping[str, Ragged] | None, staged: tuple[Ragged, ...]) -> tuple[Ragged, ...]:
        return self.inner.read(kept, staged)

    def attend(self, query: Tensor, layer: int, mask: Tensor | None, scale: float | None = None) -> Tensor:
        keys, values = self.seen(layer)
        self.asked.append((query, keys.data, values.data))
        return attention(query, keys.data, values.data, keys.lengths, mask, scale)


@lru_cache(maxsize=1)
def _cases() -> list[tuple[Tensor, Plain, Plain]]:
    """Queries with keys and values: of nano after 1,500 tokens in every layer, and random ones in rows of unlike length."""
    model, rows = long_text()
    state = Watched(Full())
    cache = StateCache(model, state)
    with torch.inference_mode():
        model(rows[:3, :1500], past_key_values=cache)
        model(rows[:3, 1500:1501], past_key_values=cache)
    lengths = (1501, 700, 130)
    found = [(query, Plain((keys,), lengths), Plain((values,), lengths)) for query, keys, values in state.asked]
    draw = torch.Generator().manual_seed(0)
    for h, k, d in ((4, 1, 64), (8, 8, 128), (6, 2, 40)):
        uneven = (2000, 1, 513, 1024)
        keys, values = (Plain((torch.randn(4, k, 2000, d, generator=draw),), uneven) for _ in range(2))
        found.append((torch.randn(4, h, 1, d, generator=draw) * 3, keys, values))
    return found


def _exact(lab: Lab, share: Share) -> Verdict:
    worst, count = 0.0, 0
    for query, keys, values in _cases():
        right = attention(query.double(), keys.pages[0].double(), values.pages[0].double(), keys.lengths)
        for workers in WORKERS:
            with threads(workers):
                found = held_attention(query, [keys], [values], schedule=share)
            worst, count = max(worst, float((found - right).abs().max() / right.abs().max())), count + 1
    numbers = {"greatest difference, as a share of the greatest result": Measurement(worst, "", count)}
    return judged([] if worst < 1e-5 else [f"results differ by {worst:.2g} of the greatest"], numbers)


# ---- shares and time


def _load(share: Share, tiles: Sequence[int], workers: int) -> int:
    """Tiles of the most loaded worker."""
    load = [0] * workers
    for run in share(tiles, workers):
        load[run.worker] += run.last - run.first
    return max(load)


def _balance(lab: Lab, share: Share) -> Verdict:
    cases = {
        "1 head, 512 tiles": [512], "9 heads alike": [64] * 9,
        "3 rows of unlike length, 8 heads": [n for n in (256, 64, 3) for _ in range(8)],
    }  # fmt: skip
    numbers, wrong = {}, []
    for name, tiles in cases.items():
        for workers in (2, 8, 108):
            ours, least = _load(share, tiles, workers), -(-sum(tiles) // workers)
            others = {label: _load(other, tiles, workers) for label, other in (("a pair each", by_pair), ("fixed split", fixed_split))}
            for label, other in others.items():
                numbers[f"{name}, {workers} workers: greatest load, {label} / ours"] = Measurement(other / ours, "", 1)
            if ours > least:
                wrong.append(f"{name}, {workers} workers: one has {ours} tiles, its share is {least}")
            if len(tiles) % workers and ours >= others["a pair each"]:
                wrong.append(f"{name}, {workers} workers: no better than a pair each")
            if min(others.values()) < ours:
                wrong.append(f"{name}, {workers} workers: worse than another")
    return judged(wrong, numbers)


def _time(lab: Lab, share: Share) -> Verdict:
    if native() is None:
        return Verdict("cannot be checked here", {}, "no native kernels are installed")
    if (os.cpu_count() or 1) < 2:
        return Verdict("cannot be checked here", {}, "one processor has nothing to share")
    draw = torch.Generator().manual_seed(0)
    keys, values = (Plain((torch.randn(1, 1, 65536, 128, generator=draw).bfloat16(),), (65536,)) for _ in range(2))
    query = torch.randn(1, 4, 1, 128, generator=draw).bfloat16()
    ways = {"ours": share, "a pair each": by_pair}
    with threads(2):
        runs = [partial(held_attention, query, [keys], [values], schedule=one) for one in ways.values()]
        took = dict(zip(ways, turns(runs, 15 if lab.quick else 50), strict=True))
    numbers = {
        f"time, {name}": Measurement(statistics.median(times), "s", len(times), min(times), max(times)) for name, times in took.items()
    }
    ratio = statistics.median(took["a pair each"]) / statistics.median(took["ours"])
    numbers["time, a pair each / ours"] = Measurement(ratio, "", len(took["ours"]))
    return judged([] if ratio >= 1.3 else [f"{ratio:.2f} times as fast as with a worker for each pair, not 1.3 times"], numbers)


PAPER = Paper("Sanovar et al.", 2024, "arXiv:2405.10480", "section 5")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Attention from shares that end anywhere is dense softmax attention to rounding, for any workers and rows of unlike length.",
        where=Paper("Sanovar et al.", 2024, "arXiv:2405.10480", "section 3"),
        scale="queries of nano over 1,501 tokens in every layer, and random ones in fp32, against fp64; 1 to 8 workers; no chance in it",
        check=partial(_exact, share=Lean()),
        broken=partial(_exact, share=forgetful),
    ),
    Claim(
        says="No worker has more than an equal share of the tiles, nor more than with FlashAttention-2's or FlashDecoding's shares.",
        where=PAPER,
        scale="tiles counted, 2 to 108 workers, one head, rows of unlike length, heads that do not divide; no chance in it",
        check=partial(_balance, share=Lean()),
        broken=partial(_balance, share=by_pair),
    ),
    Claim(
        says="Decoding over one long row is faster than with a worker for each head (at least 1.3 times with 2 of them).",
        where=PAPER,
        scale="4 queries of one head over 65,536 tokens of 128 channels in bf16, 2 threads, medians of 15 (in full 50) calls in turns",
        check=partial(_time, share=Lean()),
        broken=partial(_time, share=by_pair),
        timed=True,
    ),
)
