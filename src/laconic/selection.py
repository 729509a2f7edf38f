"""Choosing documents of a pool that read like a target sample: three passes over the pool, a chunk of it in memory at a time.

A score says what each document is worth, a search buys within the budget: the same two roles that choose levels for matrices."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.budget import pool_budget
from laconic.core.errors import UserError
from laconic.core.menu import Cost, Damage, Menu, Row, Search
from laconic.core.score import Score, Unit
from laconic.core.site import Examples, Site, TensorId
from laconic.core.statistic import Seen, Statistic, Total
from laconic.data import documents
from laconic.kernels.ngrams import kl_of_counts, ngram_counts

# words and pairs of words, hashed: Xie et al. 2023, section 3
BUCKETS = 10_000
ORDER = 2
# of the shares whose KL is reported
SMOOTHING = 1e-8
# documents whose features are in memory at once
CHUNK = 128
WORTH = "nats of log importance weight"

Progress = Callable[[str, int, int, str], None]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    todo = iter(texts)
    while chunk := list(itertools.islice(todo, CHUNK)):
        yield chunk


def unlike(texts: Iterable[str]) -> Iterator[str]:
    """The texts without those that were there before."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.sha256(text.strip().encode()).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            yield text


def _site(name: str) -> Site:
    return Site(name, Examples(), {"weight": TensorId(name)}, (CHUNK, BUCKETS))


def total_of(texts: Iterable[str], tell: Callable[[int], None]) -> tuple[Tensor, list[int]]:
    """Features of all texts together, (BUCKETS,), and the bytes of each."""
    statistic, sizes = Total(""), []
    state = statistic.init(_site("texts"))
    for chunk in _chunks(texts):
        sizes += [len(text.encode()) for text in chunk]
        state = statistic.update(state, Seen(x=ngram_counts(chunk, buckets=BUCKETS, order=ORDER)))
        tell(len(sizes))
    return statistic.finish(state), sizes


def scores_of(texts: Iterable[str], score: Score, stats: dict[Statistic, Tensor], tell: Callable[[int], None]) -> Tensor:
    """The score of each text, (count,) fp64."""
    found: list[Tensor] = []
    for chunk in _chunks(texts):
        counts = ngram_counts(chunk, buckets=BUCKETS, order=ORDER)
        worth = score(Unit(_site("pool")._replace(shape=tuple(counts.shape)), counts), stats)
        if worth.shape != (len(chunk),):
            raise UserError(f"{type(score).__name__} scores no examples: use a score of the family select, such as select.score.dsir")
        found.append(worth.double())
        tell(sum(len(part) for part in found))
    return torch.cat(found)


def menu_of(sizes: Sequence[int], worth: Tensor) -> Menu:
    """Each document may be left out at no cost, or taken: its bytes, one example, and its worth spared."""
    rows: list[Row] = []
    for i, (size, value) in enumerate(zip(sizes, worth.tolist(), strict=True)):
        covers = frozenset({str(i)})
        rows.append(Row(covers, "leave", {}, Cost(0), Damage(0.0, WORTH, "pool")))
        rows.append(Row(covers, "take", {}, Cost(size, examples=1), Damage(-value, WORTH, "pool")))
    return Menu(tuple(rows))


def select(
    pool: str,
    like: str,
    *,
    budget: Sequence[str],
    score: Score,
    search: Search,
    seed: int,
    out: Path,
    overwrite: bool = False,
    progress: Progress,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the chosen documents of `pool` to `out` (.jsonl, in the pool's order, repeated ones once); -> counts and how near they come to
    `like`: KL(like || pool) and KL(like || chosen) of the features, in nats a feature, and their difference (KL reduction)."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: give another -o, or --overwrite")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} of -o does not exist: make it, or write elsewhere")
    target, some = total_of(unlike(documents(like)), lambda n: progress("reading", n, 0, like))
    total, sizes = total_of(unlike(documents(pool)), lambda n: progress("reading", n, 0, pool))
    if not some or not sizes:
        raise UserError(f"{pool if some else like} holds no text: pass a file with documents in it")
    bounds = pool_budget(budget, sum(sizes))
    stats: dict[Statistic, Tensor] = {Total("target"): target, Total("pool"): total}
    if missing := [statistic for statistic in score.wants if statistic not in stats]:
        raise UserError(f"{type(score).__name__} wants {missing[0]}, which texts do not have: use a score of the family select")
    worth = scores_of(unlike(documents(pool)), score, stats, lambda n: progress("scoring", n, len(sizes), pool))
    generator = torch.Generator().manual_seed(seed)
    plan = search(menu_of(sizes, worth), bounds, judge=None, rng=generator, log=log)
    taken = {int(name) for row in plan.rows if row.method == "take" for name in row.covers}
    if not taken:
        raise UserError(f"the budget {' '.join(budget)} is below every document of {pool}: ask for more")
    chosen = _write(unlike(documents(pool)), taken, out)
    before, after = (kl_of_counts(target, counts, SMOOTHING) for counts in (total, chosen))
    return {
        "documents": len(sizes),
        "chosen": len(taken),
        "bytes_pool": sum(sizes),
        "bytes": sum(sizes[i] for i in taken),
        "kl_pool": before,
        "kl_chosen": after,
        "kl_reduction": before - after,
        "seed": seed,
    }


def _write(texts: Iterator[str], taken: set[int], out: Path) -> Tensor:
    """Writes the taken ones beside `out` and renames; -> their features together."""
    handle, name = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
    near = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:

            def written() -> Iterator[str]:
                for i, text in enumerate(texts):
                    if i in taken:
                        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                        yield text

            total, _ = total_of(written(), lambda n: None)
        # mkstemp writes for the owner alone
        near.chmod(0o644)
        near.replace(out)
    except BaseException:
        near.unlink(missing_ok=True)
        raise
    return total
