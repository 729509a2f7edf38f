"""Claims of LoRC: a quantizer with its low-rank correction against the quantizer without, and against the same bytes in finer groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Found, held, judged, layer_error, on, run, seen, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Dense, Product, Sum
from laconic.core.site import Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.lowrank import low_rank
from laconic.methods.quantize.residual.lorc import Compensated, LoRC
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.rtn import RTN

Factors = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def random_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The stand-in: random factors of the norm that the true ones have."""
    left, right = low_rank(error, rank)
    generator = torch.Generator().manual_seed(0)

    def like(factor: Tensor) -> Tensor:
        noise = torch.randn(factor.shape, generator=generator)
        return noise * (factor.norm() / noise.norm())

    return like(left), like(right)


@dataclass(frozen=True)
class Plain(Transform):
    """A quantizer with a correction whose factors are held as they are, made by any function."""

    first: Transform
    factors: Factors = low_rank

    acts_on = (Linear,)
    level = Compensated

    @property
    def wants(self) -> tuple:  # type: ignore[override, type-arg]
        return self.first.wants

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Compensated) -> Change:
        edit = self.first(site, weights, stats, level.first)
        base = edit.hold[site.tensors["weight"]]
        error = weights["weight"].float().reshape(site.matrix) - base.dense().reshape(site.matrix)
        left, right = self.factors(error, level.rank)
        return Change(hold={site.tensors["weight"]: Sum(base, Product(Dense(left.T.contiguous()), Dense(right)))})

    def stored(self, site: Site, level: Compensated) -> int:
        n, m = site.matrix
        return self.first.stored(site, level.first) + 4 * level.rank * (n + m)


def _pairs(
    bench: Bench, first: Transform, corrected: Transform, bits: int, rank: int, seeds: Sequence[int] = SEEDS
) -> list[tuple[tuple[Found, float], tuple[Found, float]]]:
    """(bare, corrected) for each seed, each measured and with its layer output error; a quantizer without data has one."""
    level = Grid(bits, None)

    def both(transform: Transform, at: Any, seed: int) -> tuple[Found, float]:
        return seen(bench, transform, at, seed), layer_error(bench, held(bench, transform, at, seed))

    return [(both(first, level, seed), both(corrected, Compensated(level, rank), seed)) for seed in (seeds if first.wants else seeds[:1])]


def _gains(bench: Bench, first: Transform, corrected: Transform, quick: bool, seeds: Sequence[int]) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for bits, rank in [(4, 8), (3, 8)] if quick else [(4, 4), (4, 8), (3, 4), (3, 8)]:
        label = f"{bits} bits, rank {rank}"
        pairs = _pairs(bench, first, corrected, bits, rank, seeds)
        for name, which in (("bare", 0), ("corrected", 1)):
            numbers[f"{label}: layer output error, {name}"] = spread([pair[which][1] for pair in pairs], "share of the output")
            numbers[f"{label}: perplexity, {name}"] = spread([pair[which][0].perplexity for pair in pairs], "")
            numbers[f"{label}: bytes, {name}"] = spread([float(pair[which][0].bytes) for pair in pairs], "bytes")
        if any(after[1] >= before[1] for before, after in pairs):
            wrong.append(f"{label}: the layers' output error does not fall")
        if any(after[0].loss >= before[0].loss for before, after in pairs):
            wrong.append(f"{label}: perplexity does not fall")
    return judged(wrong, numbers)


def _factors(bench: Bench, factor_bits: int) -> Verdict:
    """How much of the gain in layer output error, and in KL, low-bit factors change."""
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    for bits in (4, 3):
        exact = _pairs(bench, RTN(), Plain(RTN()), bits, 8)
        stored = _pairs(bench, RTN(), LoRC(RTN(), factor_bits=factor_bits), bits, 8)
        for what, values in (
            ("layer output error", [(b[0][1], b[1][1], a[1][1]) for b, a in zip(exact, stored, strict=True)]),
            ("KL", [(b[0][0].kl, b[1][0].kl, a[1][0].kl) for b, a in zip(exact, stored, strict=True)]),
        ):
            shares = [(low - exactly) / (bare - exactly) for bare, exactly, low in values]
            numbers[f"{bits} bits: part of the gain in {what} that {factor_bits}-bit factors change"] = spread(shares, "share")
            if any(abs(share) >= 0.05 for share in shares):
                wrong.append(f"{bits} bits: {factor_bits}-bit factors change the gain in {what} by {max(map(abs, shares)):.1%}")
    return judged(wrong, numbers)


def _spectrum(bench: Bench, factors: Factors) -> Verdict:
    """What is left of the weights' error is what the dropped singular values hold."""
    worst, count = 0.0, 0
    for rank in (4, 8):
        for name, form in held(bench, RTN(), Grid(4, None)).items():
            error = bench.source.read(name).float().reshape(form.matrix) - form.dense().reshape(form.matrix)
            left, right = factors(error, rank)
            rest = float((error - left @ right).double().square().sum())
            dropped = float(torch.linalg.svdvals(error.double())[rank:].square().sum())
            worst, count = max(worst, abs(rest - dropped) / dropped), count + 1
    wrong = [] if worst < 1e-4 else [f"the error left differs from the dropped energy by up to {worst:.2e}"]
    return judged(wrong, {"greatest relative difference": Measurement(worst, "", count)})


def _finer(bench: Bench, corrected: Transform, rank: int, bits: int) -> tuple[list[str], dict[str, Measurement]]:
    """LoRC on whole rows against the same quantizer with the finest groups that need no more bytes, matrix by matrix."""
    level = Compensated(Grid(bits, None), rank)

    def finest(site: Site) -> tuple[Transform, Grid] | None:
        if bench.linears(RTN(), level.first)(site) is None:
            return None
        limit = LoRC(RTN()).stored(site, level)
        return RTN(), Grid(bits, next(g for g in range(8, site.matrix[1] + 1) if RTN().stored(site, Grid(bits, g)) <= limit))

    label = f"{bits} bits, rank {rank}"
    ours = seen(bench, corrected, level)
    theirs: Found = bench.once(("finer", bits, rank), partial(run, bench, finest))
    numbers = {}
    for name, found in (("LoRC", ours), ("finer groups", theirs)):
        numbers[f"{label}: perplexity, {name}"] = spread([found.perplexity], "")
        numbers[f"{label}: KL, {name}"] = spread([found.kl], "nats/token")
        numbers[f"{label}: bytes, {name}"] = spread([float(found.bytes)], "bytes")
    return [f"{label}: finer groups have the lower perplexity"] if ours.loss >= theirs.loss else [], numbers


def _equal_bytes(bench: Bench, corrected: Transform) -> Verdict:
    found = [_finer(bench, corrected, rank, bits) for bits in (4, 3) for rank in (4, 8)]
    return judged([text for wrong, _ in found for text in wrong], {k: v for _, numbers in found for k, v in numbers.items()})


def _on_nano(check: str, lab: Lab, first: Transform, corrected: Transform, seeds: Sequence[int] = SEEDS) -> Verdict:
    if check == "gains":
        return on(lab, "nano", lambda bench: _gains(bench, first, corrected, lab.quick, lab.draws(seeds)))
    return on(lab, "nano", lambda bench: _equal_bytes(bench, corrected))


PAPER = Paper("Yao et al.", 2023, "arXiv:2303.08302", "section 5")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="LoRC lowers the layers' output error and the perplexity of round to nearest at 4 and 3 bits, one scale a row.",
        where=PAPER,
        scale="nano, all matrices of the blocks, rank 8 (in full also 4), 8-bit factors counted as bytes; no chance in it",
        check=partial(_on_nano, "gains", first=RTN(), corrected=LoRC(RTN())),
        broken=partial(_on_nano, "gains", first=RTN(), corrected=Plain(RTN(), random_factors)),
    ),
    Claim(
        says="LoRC lowers the layers' output error and the perplexity of GPTQ at 4 and 3 bits, one scale a row.",
        where=PAPER,
        scale="nano, all matrices of the blocks, rank 8 (in full also 4), 8-bit factors counted as bytes, 3 draws of the calibration rows",
        check=partial(_on_nano, "gains", first=GPTQ(), corrected=LoRC(GPTQ())),
        broken=partial(_on_nano, "gains", first=GPTQ(), corrected=Plain(GPTQ(), random_factors), seeds=ONE),
    ),
    Claim(
        says="Holding the factors in 8 bits changes what LoRC gains, in layer output error and in KL, by under 5 %.",
        where=PAPER,
        scale="nano, all matrices of the blocks, round to nearest at 4 and 3 bits, rank 8; the stand-in has 2-bit factors; no chance in it",
        check=lambda lab: on(lab, "nano", lambda bench: _factors(bench, 8)),
        broken=lambda lab: on(lab, "nano", lambda bench: _factors(bench, 2)),
    ),
    Claim(
        says="The weights' error that LoRC leaves is the energy of the singular values that it drops.",
        where=PAPER,
        scale="nano, all matrices of the blocks, round to nearest at 4 bits, ranks 4 and 8; no chance in it",
        check=lambda lab: on(lab, "nano", lambda bench: _spectrum(bench, low_rank)),
        broken=lambda lab: on(lab, "nano", lambda bench: _spectrum(bench, random_factors)),
    ),
    Claim(
        says="At equal bytes LoRC on whole rows has a lower perplexity than finer groups.",
        where=PAPER,
        scale="nano, all matrices of the blocks, round to nearest at 4 and 3 bits, ranks 4 and 8, factors included; no chance in it",
        check=partial(_on_nano, "equal", first=RTN(), corrected=LoRC(RTN())),
        broken=partial(_on_nano, "equal", first=RTN(), corrected=Plain(RTN(), random_factors)),
    ),
)
