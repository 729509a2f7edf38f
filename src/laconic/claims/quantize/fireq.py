"""Claims of FireQ: weights in 4 bits with scales in fp8, inputs and queries in fp8, keys and values in 4 bits, against the same without
scaled channels, in the same bytes; and of the numbers that its kernel looks up.

Channels are made loud by powers of two: some of each norm, with what reads them quieter by as much, and some rotary pairs of each key head,
their queries quieter. So the function stays, and the rounding is all that differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.claims.lab import (
    CHANNELS,
    LOUDER,
    ONE,
    SEEDS,
    Bench,
    Duel,
    Factors,
    Found,
    as_trained,
    attending,
    change,
    duel,
    gathered,
    held,
    judged,
    loud_norms,
    measured,
    on,
    put,
    rescaled,
    seen,
    spread,
)
from laconic.claims.quantize.awq import Inverted, rewritten
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.site import Linear, Paired, Site
from laconic.core.state import stretched
from laconic.core.transform import Align, Change, Stats, Transform
from laconic.kernels.bits import pack
from laconic.kernels.grids import LEAST, MANTISSA, Grid, encode, fit_range, floated, to_bytes
from laconic.kernels.inputs import floating
from laconic.methods.cache.store.fireq import followed, quantize
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.inputs import Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.smooth.fireq import FireQ, entries, looked_up
from laconic.models import Source
from laconic.runtime import key_peaks

GRID = Grid(4, 128, symmetric=True, scales="e4m3")
METHOD, LEVEL = Inputs(RTN()), WeightAndInputs(GRID, "e4m3")
BITS, GROUP = 4, 128
# loud pairs of each key head: those that the cache takes and some more; how much louder channels and pairs are, so that nothing collapses
PAIRS, LOUD = 5, {"nano": 16.0, "stories260k": 4.0}


# ---- the whole scheme


def _louder(source: Source, seed: int, factor: float) -> Factors:
    """Loud channels behind norms, and loud pairs of keys."""
    found, generator = loud_norms(source, seed, factor=factor, count=CHANNELS), torch.Generator().manual_seed(seed)
    for edge in source.anatomy.edges():
        if (act := edge.may(Paired)) is None:
            continue
        by = torch.ones(edge.width // edge.block, edge.block)
        for head in by:
            pairs = torch.randperm(act.half, generator=generator)[: min(PAIRS, act.half // 2)]
            head[pairs], head[pairs + act.half] = factor, factor
        for members, factors in ((edge.writers, by.flatten()), (edge.readers, 1 / by.flatten())):
            for member in members:
                along = torch.ones(member.site.shape[member.axis])
                for i, one in enumerate(factors.tolist()):
                    along[list(member.index(i))] = one
                found.setdefault(member.site.tensors["weight"].name, []).append((member.stored_axis, along))
    return found


def loud(bench: Bench, seed: int) -> Bench:
    """The bench of a model with loud channels and loud pairs."""
    return rescaled(bench, ("norms and keys", seed), partial(_louder, seed=seed, factor=LOUD[bench.name]))


Make = Callable[[Bench, int], Bench]


@dataclass(frozen=True)
class Scheme:
    """How channels are scaled, None for not at all; top_k: pairs of keys that are scaled after the turn, astray: the wrong way round."""

    how: Align | None = None
    top_k: int = 0
    astray: bool = False


PLAIN, WHOLE = Scheme(), Scheme(FireQ(), FireQ().top_k)
PARTS = {"of inputs alone": Scheme(FireQ(rotary=False)), "of keys alone": Scheme(FireQ(linear=False), FireQ().top_k)}
ASTRAY = Scheme(Inverted(FireQ()), FireQ().top_k, astray=True)


def _rounded(x: Tensor, by: Tensor | None) -> Tensor:
    """Keys or values as they are held in codes."""
    wide = x.float() if by is None else stretched(x, by)
    codes, scales = quantize(wide, BITS, GROUP)
    found = (codes.float() - 2 ** (BITS - 1)) * scales.float().repeat_interleave(min(GROUP, x.shape[-1]), -1)[..., : x.shape[-1]]
    return (found if by is None else stretched(found, 1 / by)).to(x.dtype)


def _found(bench: Bench, scheme: Scheme, seed: int) -> Found:
    """Matrices of the blocks, their inputs, keys, values and queries rounded, on the certify part."""

    def make() -> Found:
        own = rewritten(bench, scheme.how, seed)
        forms, model = change(own, own.linears(METHOD, LEVEL), seed), own.source.load(torch.float32)
        put(own, model, forms)
        factors = {}
        if scheme.top_k:
            peaks = [one for one in key_peaks(model, own.drawn(seed)) if one is not None]
            factors = {i: followed(*one, scheme.top_k, 1.0) for i, one in enumerate(peaks)}
        factors = {i: 1 / by if scheme.astray else by for i, by in factors.items()}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            by = factors.get(layer)
            query = query if by is None else stretched(query, 1 / by)
            query = floating(query) if by is None else stretched(floating(query), by)
            return query, _rounded(key, by), _rounded(value, None)

        with attending(model, attend):
            return measured(own, model, sum(form.nbytes for form in forms.values()))

    found: Found = bench.once(("fireq", scheme, 0 if scheme == PLAIN else seed), make)
    return found


@gathered
def _nearest(bench: Bench, lab: Lab, make: Make, ours: Scheme, seeds: Sequence[int]) -> Iterator[Duel]:
    full, plain = ([_found(make(bench, seed), one, seed) for seed in seeds] for one in (ours, PLAIN))
    yield duel("W4A8KV4", full, plain, names=("scaled", "plain"))
    rises = {"scaled": [one.gap for one in full], "plain": [one.gap for one in plain]}
    yield [], {f"W4A8KV4: rise of perplexity, {name}": spread(gaps, "share") for name, gaps in rises.items()}
    if not lab.quick:
        for name, scheme in PARTS.items():
            yield [], {f"W4A8KV4: KL, {name}": spread([_found(make(bench, seed), scheme, seed).kl for seed in seeds], "nats/token")}


# ---- scales and tables


@dataclass(frozen=True)
class Bare(Transform):
    """Round to nearest with scales in e4m3 and no factor of the matrix: what is below the least number becomes that."""

    acts_on = (Linear,)
    level = Grid

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        weight = weights["weight"].reshape(site.matrix).float()
        scale, zero = fit_range(weight, level)
        scale = floated(scale)
        codes = pack(encode(weight, scale, zero, level), level.bits)
        form = Grouped(site.shape, level, codes, to_bytes(scale), None, torch.zeros(1, dtype=torch.int16))
        return Change(hold={site.tensors["weight"]: form})

    def stored(self, site: Site, level: Grid) -> int:
        return Grouped.bytes_of(*site.matrix, level)


class Scales(NamedTuple):
    """Shares of the scales that lie below the least normal number of e4m3, and below the least number, as they are stored; squared error of
    the weights as a share of their squares."""

    small: float
    lost: float
    error: float


def _scaled(bench: Bench, method: Transform) -> Scales:
    small, lost, count, error, whole = 0, 0, 0, 0.0, 0.0
    for name, form in held(bench, method, GRID).items():
        assert isinstance(form, Grouped)
        weight = bench.source.read(name).float().reshape(form.matrix)
        own = torch.ldexp(fit_range(weight, GRID)[0], -form.least.to(torch.int32))
        error += float((form.dense() - weight).square().sum())
        whole += float(weight.square().sum())
        small += int((own < 2.0**LEAST).sum())
        lost += int((own < 2.0 ** (LEAST - MANTISSA)).sum())
        count += own.numel()
    return Scales(small / count, lost / count, error / whole)


def _smaller(bench: Bench) -> Bench:
    """The bench of a model whose matrices behind norms are smaller, and the norms louder by as much."""
    return rescaled(bench, "smaller", partial(loud_norms, seed=0, factor=LOUDER, count=2**20))


@gathered
def _underflow(bench: Bench, ours: Transform) -> Iterator[Duel]:
    for where, own in (("as trained", bench), ("smaller", _smaller(bench))):
        found = {name: _scaled(own, method) for name, method in (("factor", ours), ("no factor", Bare()))}
        for name, one in found.items():
            yield [], {f"{where}: scales below the least normal number, {name}": Measurement(one.small, "share", 1)}
            yield [], {f"{where}: scales below the least number, {name}": Measurement(one.lost, "share", 1)}
            yield [], {f"{where}: squared error of the weights, {name}": Measurement(one.error, "share", 1)}
        wrong = [f"{where}: with the factor scales underflow"] if found["factor"].small > 0.01 else []
        wrong += [f"{where}: without the factor no scale underflows"] if not found["no factor"].small else []
        yield wrong + ([f"{where}: the weights err no less"] if found["factor"].error >= found["no factor"].error else []), {}


@gathered
def _costs(bench: Bench, ours: Transform) -> Iterator[Duel]:
    own = _smaller(bench)
    yield duel("smaller", [seen(own, ours, GRID)], [seen(own, Bare(), GRID)], names=("factor", "no factor"))


def _table(bench: Bench, shift: int) -> Verdict:
    """Weights and products by the table of each group, and by arithmetic; entries exact, and in fp8 as tensor cores take them."""
    generator = torch.Generator().manual_seed(0)
    same: dict[str, list[bool]] = {}
    cost = []
    for form in held(bench, RTN(), GRID).values():
        assert isinstance(form, Grouped)
        codes, scale, zero = form.plain()
        octave, runs = int(form.least), (codes.float() - zero.repeat_interleave(GRID.width(form.matrix[1]), 1)[:, : form.matrix[1]])
        wide = scale.repeat_interleave(GRID.width(form.matrix[1]), 1)[:, : form.matrix[1]]
        x = floating(torch.randn(64, form.matrix[1], generator=generator))
        product = runs * wide
        ratio = torch.ldexp(product, torch.tensor(-octave))
        cast = torch.ldexp(ratio.to(torch.float8_e4m3fn).float(), torch.tensor(octave))
        for name, plain, float8 in (("exact", product, False), ("fp8", cast, True)):
            found = looked_up(codes, entries(scale, octave, float8).roll(shift, -1), GRID)
            same.setdefault(f"weights, entries {name}", []).append(torch.equal(found, plain))
            same.setdefault(f"products, entries {name}", []).append(torch.equal(F.linear(x, found), F.linear(x, plain)))
        same.setdefault("weights, as they are held", []).append(torch.equal(form.dense(), product))
        cost.append(float((cast - product).norm() / product.norm()))
    numbers = {f"matrices with the same bits: {name}": Measurement(sum(one) / len(one), "share", len(one)) for name, one in same.items()}
    numbers["what entries in fp8 differ by"] = spread(cost, "share of the norm")
    return judged(
        [f"{name}: {len(one) - sum(one)} of {len(one)} matrices have other bits" for name, one in same.items() if not all(one)], numbers
    )


def _on(name: str, make: Make, ours: Scheme, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _nearest(bench, lab, make, ours, lab.draws(seeds)))


def _scales(name: str, ours: Transform, lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _underflow(bench, ours))


def _lost(name: str, ours: Transform, lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _costs(bench, ours))


def _looked(name: str, shift: int, lab: Lab) -> Verdict:
    return on(lab, name, lambda bench: _table(bench, shift))


PAPER = Paper("Baek et al.", 2025, "arXiv:2505.20839")
PLANTED = f"; {CHANNELS} channels of each norm and up to {PAIRS} pairs of each key head %g times louder, 3 draws of these and of the rows"
DRAWS = "; 3 draws of the calibration rows"
NANO = "nano, all matrices of the blocks in groups of 128, inputs, queries, keys and values rounded"
STORIES = "stories260k on TinyStories, all matrices of the blocks in groups of 128, inputs, queries, keys and values rounded"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With loud channels and loud key pairs, scaled channels at W4A8KV4 have a lower KL and perplexity than plain groups "
        "in as many bytes.",
        where=PAPER,
        scale=NANO + PLANTED % LOUD["nano"],
        check=partial(_on, "nano", loud, WHOLE, SEEDS),
        broken=partial(_on, "nano", loud, ASTRAY, ONE),
    ),
    Claim(
        says="As trained too, scaled channels at W4A8KV4 have a lower KL and perplexity than plain groups in as many bytes.",
        where=PAPER,
        scale=NANO + DRAWS,
        check=partial(_on, "nano", as_trained, WHOLE, SEEDS),
        broken=partial(_on, "nano", as_trained, ASTRAY, ONE),
    ),
    Claim(
        says="With loud channels and loud key pairs, scaled channels at W4A8KV4 have a lower KL and perplexity than plain groups "
        "in as many bytes, on a model of others.",
        where=PAPER,
        scale=STORIES + PLANTED % LOUD["stories260k"],
        check=partial(_on, "stories260k", loud, WHOLE, SEEDS),
        broken=partial(_on, "stories260k", loud, ASTRAY, ONE),
    ),
    Claim(
        says="As trained too, scaled channels at W4A8KV4 have a lower KL and perplexity than plain groups in as many bytes, on a model "
        "of others.",
        where=PAPER,
        scale=STORIES + DRAWS,
        check=partial(_on, "stories260k", as_trained, WHOLE, SEEDS),
        broken=partial(_on, "stories260k", as_trained, ASTRAY, ONE),
    ),
    Claim(
        says="Without the matrix's factor scales in e4m3 underflow and weights err more; with it next to none does.",
        where=PAPER,
        scale="nano as trained, and with matrices behind norms 16 times smaller, in groups of 128, weights alone; no chance in it",
        check=partial(_scales, "nano", RTN()),
        broken=partial(_scales, "nano", Bare()),
    ),
    Claim(
        says="Where matrices are small, KL and perplexity are lower with the matrix's factor.",
        where=PAPER,
        scale="nano with matrices behind norms 16 times smaller, in groups of 128, weights alone; no chance in it",
        check=partial(_lost, "nano", RTN()),
        broken=partial(_lost, "nano", Bare()),
    ),
    Claim(
        says="Weights and products by a table of 16 entries a group have the bits of dequantizing and multiplying, exact or in fp8.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 64 drawn inputs in e4m3 each",
        check=partial(_looked, "nano", 0),
        broken=partial(_looked, "nano", 1),
    ),
)
