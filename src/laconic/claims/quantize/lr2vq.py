"""Claims of LR2VQ: vectors of kernels in fewer dimensions than they are long, against product quantization in as many bytes, with codes
that stay while tables learn and with differentiable k-means, all with the same steps on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, gathered, held, measure, on, spread, taught
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Packed, Soft
from laconic.core.site import Conv, Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.methods.quantize.grid.spans import Span, Spanned, cut
from laconic.methods.quantize.round.lr2vq import LR2VQ, errors, fitted
from laconic.methods.quantize.train.annealed import Annealed

# one kernel is a vector of nine; about 36 and 25 times fewer bytes than in fp32
WIDTH, OURS, LARGER = 9, Span(9, 64, 4), Span(9, 128, 6)
RANKS = (1, 2, 3, 4, 6, 9)
# of these each learns, to see which is the best
TAUGHT = (2, 4, 6, 9)
RATES = (("position", 1e-2), ("table", 1e-2), ("basis", 1e-2), ("step", 3e-3))


@dataclass(frozen=True)
class Fixed(Annealed):
    """Tables (and a basis) learn, codes stay: what is done after plain k-means."""

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.coded()


@dataclass(frozen=True)
class Contrary(Transform):
    """The stand-in: a basis of the directions in which vectors vary least."""

    seed: int = 0

    acts_on = (Linear, Conv)
    level = Span

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Span) -> Change:
        n, m = site.matrix
        span, vectors = level.fitted(n, m), cut(weights["weight"].reshape(n, m).float(), level.width)
        basis = torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors.T[: span.rank].float().bfloat16().float()
        numbers = vectors @ torch.linalg.pinv(basis)
        codes, table, _ = fitted(numbers, replace(span, width=span.rank), torch.Generator().manual_seed(self.seed))
        return Change(hold={site.tensors["weight"]: Spanned.of(site.shape, span, codes.reshape(n, -1), table, basis)})

    def stored(self, site: Site, level: Span) -> int:
        return LR2VQ().stored(site, level)


def _sites(bench: Bench) -> list[Site]:
    return [site for site in bench.source.anatomy.sites() if isinstance(site.kind, Conv | Linear)]


def _bytes(bench: Bench, level: Span) -> int:
    return sum(LR2VQ().stored(site, level) for site in _sites(bench))


def _filled(bench: Bench, rank: int, size: Span = OURS, *, over: bool = False) -> Span:
    """Of a rank the level with the most entries that takes no more bytes than `size`, or the first that takes no fewer."""
    limit, best = _bytes(bench, size), Span(WIDTH, 2, rank)
    for entries in range(2, 8 * size.entries):
        level = Span(WIDTH, entries, rank)
        taken = _bytes(bench, level)
        if over and taken >= limit:
            return level
        best = level if taken <= limit else best
    return best


def _lesson(lab: Lab, kind: type[Annealed] = Annealed) -> Annealed:
    return kind(rates=RATES, steps=24 if lab.quick else 96, batch=64)


def learned(bench: Bench, lab: Lab, method: Transform, level: Span, kind: type[Annealed], seed: int, astray: bool = False) -> Found:
    """A level's forms after learning, measured; astray: each batch must meet another one's predictions."""

    def make() -> Found:
        return measure(bench, taught(bench, held(bench, method, level), _lesson(lab, kind), seed, astray=astray)[0])

    found: Found = bench.once(("lr2vq", method, level, kind, lab.quick, seed, astray), make)
    return found


@gathered
def _ahead(bench: Bench, lab: Lab, ours: type[Transform], seeds: Sequence[int]) -> Iterator[Duel]:
    plain = _filled(bench, WIDTH, over=True)
    ways = {
        "LR2VQ": [learned(bench, lab, ours(seed=seed), OURS, Annealed, seed) for seed in seeds],  # type: ignore[call-arg]
        "differentiable k-means": [learned(bench, lab, LR2VQ(seed), plain, Annealed, seed) for seed in seeds],
        "k-means": [learned(bench, lab, LR2VQ(seed), plain, Fixed, seed) for seed in seeds],
    }
    weights = sum(site.matrix[0] * site.matrix[1] for site in _sites(bench))
    for name, found in ways.items():
        yield [], {f"right answers, {name}": spread([one.loss for one in found], "share")}
        yield [], {f"KL, {name}": spread([one.kl for one in found], "nats/image")}
        yield [], {f"bytes, {name}": spread([float(one.bytes) for one in found], "bytes")}
        yield [], {f"bytes in fp32 / stored, {name}": Measurement(4 * weights / found[0].bytes, "", 1)}
    yield [], {"right answers, original": spread([ways["LR2VQ"][0].original], "share")}
    for name in ("differentiable k-means", "k-means"):
        pairs = list(zip(ways["LR2VQ"], ways[name], strict=True))
        wrong = [f"no more right answers than {name}"] if any(a.loss <= b.loss for a, b in pairs) else []
        wrong += [f"KL is not below that of {name}"] if any(a.kl >= b.kl for a, b in pairs) else []
        yield wrong + ([f"{name} takes fewer bytes"] if any(b.bytes < a.bytes for a, b in pairs) else []), {}


def _whole(bench: Bench, level: Span, seed: int) -> tuple[float, float]:
    """Squares that the bases leave out, and those of what is rounded, as shares of the weights' squares."""
    left, rounded, total = 0.0, 0.0, 0.0
    for site in _sites(bench):
        vectors = cut(bench.source.read(site.tensors["weight"].name).float().reshape(site.matrix), level.width)
        found = errors(vectors, level.fitted(*site.matrix), torch.Generator().manual_seed(seed))
        left, rounded, total = left + found.left, rounded + found.rounded, total + float(vectors.square().sum())
    return left / total, rounded / total


def _curve(bench: Bench, seed: int, size: Span | None = OURS) -> dict[int, tuple[float, float]]:
    """Of each rank, in the bytes of a size or, without one, with as many entries."""
    levels = {rank: Span(WIDTH, OURS.entries, rank) if size is None else _filled(bench, rank, size) for rank in RANKS}
    made: dict[int, tuple[float, float]] = bench.once(
        ("curve", seed, size), lambda: {rank: _whole(bench, level, seed) for rank, level in levels.items()}
    )
    return made


@gathered
def _bends(bench: Bench, size: Span | None, half: bool, seeds: Sequence[int]) -> Iterator[Duel]:
    """half: what the basis leaves out does not count."""
    curves = [{rank: rounded + (0.0 if half else left) for rank, (left, rounded) in _curve(bench, seed, size).items()} for seed in seeds]
    for rank in RANKS:
        yield [], {f"squared error of the weights, rank {rank}": spread([curve[rank] for curve in curves], "share")}
        yield [], {f"left out by the basis, rank {rank}": spread([_curve(bench, seed, size)[rank][0] for seed in seeds], "share")}
    wrong = []
    for curve in curves:
        values = [curve[rank] for rank in RANKS]
        least = values.index(min(values))
        falls = all(a > b for a, b in pairwise(values[: least + 1]))
        rises = all(a < b for a, b in pairwise(values[least:]))
        if least in (0, len(values) - 1) or not falls or not rises:
            wrong.append(f"the error does not fall and then rise: {', '.join(f'{value:.4f}' for value in values)}")
    yield wrong[:1], {}


@gathered
def _foreseen(bench: Bench, lab: Lab, half: bool, seeds: Sequence[int]) -> Iterator[Duel]:
    """half: what is rounded does not count for what is predicted."""
    for seed in seeds:
        curve = {rank: left + (0.0 if half else rounded) for rank, (left, rounded) in _curve(bench, seed).items()}
        said = min(TAUGHT, key=curve.__getitem__)
        found = {rank: learned(bench, lab, LR2VQ(seed), _filled(bench, rank), Annealed, seed) for rank in TAUGHT}
        best = min(TAUGHT, key=lambda rank: found[rank].kl)
        yield [], {f"draw {seed}: predicted rank": Measurement(said, "", 1), f"draw {seed}: best rank": Measurement(best, "", 1)}
        yield [], {f"draw {seed}: KL, rank {rank}": Measurement(one.kl, "nats/image", 1) for rank, one in found.items()}
        yield [], {f"draw {seed}: right answers, rank {rank}": Measurement(one.loss, "share", 1) for rank, one in found.items()}
        away = abs(TAUGHT.index(said) - TAUGHT.index(best))
        yield ([f"draw {seed}: rank {said} was predicted, {best} is the best of {TAUGHT}"] if away > 1 else []), {}


def _against(ours: type[Transform], seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, "resnet20", lambda bench: _ahead(bench, lab, ours, lab.draws(seeds)))


def _curved(size: Span | None, half: bool, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, "resnet20", lambda bench: _bends(bench, size, half, lab.draws(seeds)))


def _predicted(half: bool, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, "resnet20", lambda bench: _foreseen(bench, lab, half, lab.draws(seeds)))


PAPER = Paper("Zhu et al.", 2022, "arXiv:2211.11397")
NET = "ResNet-20 on CIFAR-10, convolutions and head in vectors of 9 weights, 30 KB where fp32 has 1.07 MB"
STEPS = "24 steps of 64 of 256 images (in full 96 of 64 of 1,024)"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Some 36 times smaller, LR2VQ has more right answers and a lower KL than product quantization by k-means and by "
        "differentiable k-means in as many bytes and steps.",
        where=PAPER,
        scale=f"{NET}, {STEPS}, 3 draws of these and of the tables",
        check=partial(_against, LR2VQ, SEEDS),
        broken=partial(_against, Contrary, ONE),
    ),
    Claim(
        says="In as many bytes the squared error of the weights falls and then rises with the rank.",
        where=PAPER,
        scale=f"{NET}, ranks {', '.join(map(str, RANKS))}, 3 draws of the tables",
        check=partial(_curved, OURS, False, SEEDS),
        broken=partial(_curved, OURS, True, ONE),
    ),
    Claim(
        says="In as many bytes the squared error of the weights falls and then rises with the rank, some 25 times smaller too.",
        where=PAPER,
        scale=f"{NET.replace('30 KB', '43 KB')}, ranks {', '.join(map(str, RANKS))}, 3 draws of the tables",
        check=partial(_curved, LARGER, False, SEEDS),
        broken=partial(_curved, LARGER, True, ONE),
    ),
    Claim(
        says="With as many entries too the squared error of the weights falls and then rises with the rank.",
        where=PAPER,
        scale=f"{NET} at rank 4, 64 entries at ranks {', '.join(map(str, RANKS))}, 3 draws of the tables",
        check=partial(_curved, None, False, SEEDS),
        broken=partial(_curved, None, True, ONE),
    ),
    Claim(
        says="The rank of least squared error before learning is the best after it, or next to that, in as many bytes.",
        where=PAPER,
        scale=f"{NET}, ranks {', '.join(map(str, TAUGHT))}, {STEPS}, 3 draws",
        check=partial(_predicted, False, SEEDS),
        broken=partial(_predicted, True, ONE),
    ),
)
