"""Claims of DSIR: what a language model that was trained on the chosen documents makes of unseen text like the target.

The model is a bigram model with Witten-Bell smoothing over nano's vocabulary: training it is counting, without step size or early end."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, judged, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.menu import Budget
from laconic.core.score import Score, Unit
from laconic.core.statistic import Statistic, Total
from laconic.kernels.ngrams import kl_of_counts, log_ratio
from laconic.methods.search.sample.gumbel import Gumbel
from laconic.methods.select.score.dsir import DSIR
from laconic.selection import SMOOTHING, menu_of, scores_of, total_of
from laconic.zoo import corpus, nano

PIECE = 1000
TARGETS = 40
# kinds of text -> files of the shared data; code is the standard library
FILES = {
    "encyclopedia": "wikitext2_valid.txt.gz",
    "drama": "tinyshakespeare.txt.gz",
    "stories": "tinystories_1000.jsonl.gz",
    "science": "darwin.txt.gz",
    "novels": "charlotte_bronte.txt.gz",
}


def pieces(text: str) -> list[str]:
    """Paragraphs joined to documents of about PIECE characters."""
    out: list[str] = []
    have = ""
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        have += block.strip() + "\n\n"
        if len(have) >= PIECE:
            out.append(have.strip())
            have = ""
    return [piece for piece in out if len(piece) < 4 * PIECE]


def _read(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    return "\n\n".join(json.loads(line) for line in text.splitlines()) if path.name.endswith(".jsonl.gz") else text


@lru_cache(maxsize=2)
def kinds(folder: Path, quick: bool) -> dict[str, list[str]]:
    """Documents by kind, as many of each."""
    found = {name: pieces(_read(folder / "text" / file)) for name, file in FILES.items()}
    found["code"] = [piece for _, text in corpus.named("calibrate") for piece in pieces(text)]
    most = 250 if quick else 800
    step = {name: max(1, len(texts) // most) for name, texts in found.items()}
    return {name: texts[:: step[name]][:most] for name, texts in found.items()}


def perplexity(train: Sequence[str], test: Sequence[str]) -> float:
    """Of a bigram model counted on `train`, for each token of `test`: p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v)), with T(v) the
    number of unlike tokens after v and p(w) the shares of tokens plus one each. Witten and Bell 1991."""
    tokenizer = _tokenizer()
    size = tokenizer.get_vocab_size()
    pairs = torch.zeros(size, size)
    ones = torch.ones(size)
    for encoded in tokenizer.encode_batch(list(train)):
        ids = torch.tensor([0, *encoded.ids])
        pairs.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
        ones += torch.bincount(ids[1:], minlength=size)
    shares = ones / ones.sum()
    count, unlike = pairs.sum(1), (pairs > 0).sum(1)
    loss, tokens = 0.0, 0
    for encoded in tokenizer.encode_batch(list(test)):
        ids = torch.tensor([0, *encoded.ids])
        v, w = ids[:-1], ids[1:]
        more = unlike[v].clamp(min=1)
        p = (pairs[v, w] + more * shares[w]) / (count[v] + more)
        loss -= float(p.double().log().sum())
        tokens += len(w)
    return math.exp(loss / tokens)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(nano.path() / "tokenizer.json"))


@dataclass(frozen=True)
class Swapped(Score):
    """The stand-in: pool and target taken for each other."""

    wants = (Total("target"), Total("pool"))

    def __call__(self, unit: Unit, stats: Mapping[Statistic, Tensor]) -> Tensor:
        return unit.weight.double() @ log_ratio(stats[Total("pool")], stats[Total("target")], DSIR().smoothing)


class Outcome(NamedTuple):
    """What a way of choosing comes to: perplexity of unseen text of the kind, and the fall of KL(target || .) and of KL(pool || .) of the
    features from the pool to what was chosen."""

    perplexity: float
    fall: float
    fall_to_pool: float


DRAWN, TOP, CHANCE, WEAKLY, LEAST = "drawn", "largest weights", "at random", "drawn at temperature 100", "smallest weights"


@lru_cache(maxsize=64)
def outcomes(score: Score, kind: str, seed: int, folder: Path, quick: bool) -> dict[str, Outcome]:
    """Each way of choosing a tenth of the pool's bytes, by a score that knows a small sample of one kind."""
    by_kind = kinds(folder, quick)
    generator = torch.Generator().manual_seed(seed)
    own = [by_kind[kind][i] for i in torch.randperm(len(by_kind[kind]), generator=generator).tolist()]
    # a small sample that is known, unseen text that is judged by, and the rest lies in the pool
    known, unseen, hidden = own[:TARGETS], own[TARGETS : TARGETS + 60], own[TARGETS + 60 :]
    pool = [*hidden, *(text for name, texts in by_kind.items() if name != kind for text in texts)]
    target, _ = total_of(known, lambda _: None)
    total, sizes = total_of(pool, lambda _: None)
    worth = scores_of(pool, score, {Total("target"): target, Total("pool"): total}, lambda _: None)
    ways = {
        DRAWN: (worth, Gumbel()),
        TOP: (worth, Gumbel(0)),
        CHANCE: (torch.zeros_like(worth), Gumbel()),
        WEAKLY: (worth, Gumbel(100)),
        LEAST: (-worth, Gumbel(0)),
    }
    found: dict[str, Outcome] = {}
    for name, (value, search) in ways.items():
        budget = Budget(bytes=sum(sizes) // 10)
        plan = search(menu_of(sizes, value), budget, judge=None, rng=generator, log=lambda _: None)
        taken = [pool[int(i)] for row in plan.rows if row.method == "take" for i in row.covers]
        counts, _ = total_of(taken, lambda _: None)
        falls = [kl_of_counts(to, total, SMOOTHING) - kl_of_counts(to, counts, SMOOTHING) for to in (target, total)]
        found[name] = Outcome(perplexity(taken, unseen), *falls)
    return found


def _each(score: Score, seeds: Sequence[int], lab: Lab) -> Iterator[tuple[str, list[dict[str, Outcome]]]]:
    for kind in ("encyclopedia", "code") if lab.quick else (*FILES, "code"):
        yield kind, [outcomes(score, kind, seed, lab.data, lab.quick) for seed in seeds]


def _at_home(check: Callable[[Lab], Verdict], lab: Lab) -> Verdict:
    if lab.data is None:
        return Verdict("cannot be checked here", {}, "the shared texts are not here; name their folder with --lab")
    return check(lab)


def _below(score: Score, seeds: Sequence[int], lab: Lab) -> Verdict:
    seeds = lab.draws(seeds)
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for kind, runs in _each(score, seeds, lab):
        for way in (DRAWN, TOP, CHANCE):
            numbers[f"{kind}, {way}: perplexity"] = spread([run[way].perplexity for run in runs], "perplexity/token")
        for run, seed in zip(runs, seeds, strict=True):
            ours, top, chance = (run[way].perplexity for way in (DRAWN, TOP, CHANCE))
            if ours >= chance:
                wrong.append(f"{kind}, draw {seed}: perplexity {ours:.1f} is not below {chance:.1f} of a random choice")
            if ours > 1.01 * top:
                wrong.append(f"{kind}, draw {seed}: perplexity {ours:.1f} is above {top:.1f} of the largest weights")
    return judged(wrong, numbers)


def fall_to_target(outcome: Outcome) -> float:
    """KL reduction."""
    return outcome.fall


def fall_to_pool(outcome: Outcome) -> float:
    """The stand-in: nearness to the pool."""
    return outcome.fall_to_pool


def _ranks(measure: Callable[[Outcome], float], seeds: Sequence[int], lab: Lab) -> Verdict:
    seeds = lab.draws(seeds)
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    # the largest weights are nearly the documents that are drawn, so they are no rank of their own
    ways = (DRAWN, WEAKLY, CHANCE, LEAST)
    for kind, runs in _each(DSIR(), seeds, lab):
        for way in ways:
            numbers[f"{kind}, {way}: perplexity"] = spread([run[way].perplexity for run in runs], "perplexity/token")
            numbers[f"{kind}, {way}: measure"] = spread([measure(run[way]) for run in runs], "nats/feature")
        for run, seed in zip(runs, seeds, strict=True):
            by_perplexity = sorted(ways, key=lambda way: run[way].perplexity)
            by_measure = sorted(ways, key=lambda way: -measure(run[way]))
            if by_perplexity != by_measure:
                wrong.append(f"{kind}, draw {seed}: by perplexity {', '.join(by_perplexity)}; by the measure {', '.join(by_measure)}")
    return judged(wrong, numbers)


PAPER = Paper("Xie et al.", 2023, "arXiv:2302.03169", "section 5 and 6")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="A model trained on documents drawn by DSIR reads unseen text like the target better than one trained on as many bytes at "
        "random, and no worse (1 %) than one trained on the documents of largest weight.",
        where=PAPER,
        scale="bigram model on nano's tokens, 6 kinds of text in pieces of 1,000 characters, a tenth of the pool, 40 pieces known, 3 draws",
        check=partial(_at_home, partial(_below, DSIR(), SEEDS)),
        broken=partial(_at_home, partial(_below, Swapped(), ONE)),
    ),
    Claim(
        says="KL reduction, which needs no training, ranks the ways of choosing as the trained models' perplexities do.",
        where=Paper("Xie et al.", 2023, "arXiv:2302.03169", "section 4"),
        scale="as above: drawn, drawn at a temperature of 100, at random, the smallest weights",
        check=partial(_at_home, partial(_ranks, fall_to_target, SEEDS)),
        broken=partial(_at_home, partial(_ranks, fall_to_pool, ONE)),
    ),
)
