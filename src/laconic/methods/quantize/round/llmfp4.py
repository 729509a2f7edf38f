"""LLM-FP4: weights and inputs in floats of few bits, format and clipping found by trial, each input channel with an exponent of its own.

Liu et al. 2023, arXiv:2310.16836, section 4. A format (e, m) with a real bias b ends at 2^(2^e - 1 - b) (2 - 2^-m), so a bias is a scale.
Search (4.1): in turn the weights' scales, one a row, and the inputs' one, each with the format, of `steps` shares of the greatest number,
down from 1.2, that make ||X_q W_q^T - X W^T||^2 least over some tokens. Pre-shifted bias (4.2): input channel j has b_j = rho + c_j, rho
the loudest channel's and c_j = clip(round(log2(max_k peak_k / peak_j)), 0, 2^e - 1), so its grid is 2^c_j times finer.
Because 2^-c_j is a shift of exponents, it may stand in the weights of the same column: y = (W_q 2^-c) Q(2^c x), bit by bit what
W_q (2^-c Q(2^c x)) is; weights are rounded without it.
weight (n, m), inputs (t, m) and their peaks (m,) -> codes (n, m) and scales (n, 1) of the weights; table, shifts (m,) int8 and scale (1,)
fp32 of the inputs: bits + 16 / m bits a weight, and m + 4 bytes. Tables are held in such floats too; their inputs are not rounded.
Sibling: quantize.round.inputs (integers, a scale for each token)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from laconic.core.claim import Card, Paper
from laconic.core.packed import Feeding, Packed, Scaled, below, restore
from laconic.core.site import Embedding, Linear, Site
from laconic.core.statistic import Peaks, Sample
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.inputs import Floats
from laconic.kernels.levels import FLOATS, Levels, decode, encode, fit_clipped, fit_scale, rounded_scale
from laconic.methods.quantize.grid.levels import Leveled

CARD = Card(Paper("Liu et al.", 2023, "arXiv:2310.16836", "section 4"), catalogue="llm-fp4", sibling="quantize.round.inputs")

# the shares of the greatest number that are tried as the clipping maximum
MOST, LEAST = 1.2, 0.3


class Floating(Feeding):
    """`inner`, whose products round their inputs to floats."""

    form = "quantize.round.llmfp4.Floating"
    shifts: Tensor
    scale: Tensor

    def __init__(self, inner: Packed, table: str, shifts: Tensor, scale: Tensor) -> None:
        super().__init__(inner)
        self.table = table
        self.register_buffer("shifts", shifts)
        self.register_buffer("scale", scale)

    @property
    def feed(self) -> Floats:
        return Floats(row_of(self.table), self.shifts.clone(), self.scale.clone())

    def over(self, inner: Packed) -> Floating:
        return Floating(inner, self.table, self.shifts, self.scale)

    def folded(self) -> Scaled:
        """The weights with the exponents of the input channels in theirs: what is multiplied with inputs that keep none."""
        return Scaled(self.inner, torch.ldexp(torch.ones(self.shifts.shape), -self.shifts.int()).bfloat16())

    def describe(self) -> dict[str, Any]:
        return {"form": self.form, "table": self.table, "inner": self.inner.describe()}

    @classmethod
    def restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        inner = restore(described["inner"], below(tensors, "inner"))
        return cls(inner, described["table"], tensors["shifts"], tensors["scale"])


def row_of(table: str) -> Levels:
    """A float format with one scale a row."""
    exponent, mantissa, _ = FLOATS[table]
    return Levels(1 + exponent + mantissa, table, None)  # type: ignore[arg-type]


def formats(bits: int) -> list[Levels]:
    """All float formats of so many bits, the usual one first."""
    return [row_of(table) for table, (exponent, mantissa, _) in FLOATS.items() if 1 + exponent + mantissa == bits]


def shares(steps: int) -> list[float]:
    """Of the greatest number, the whole of it first."""
    return [1.0, *torch.linspace(MOST, LEAST, steps).tolist()]


def pre_shifted(peaks: Tensor, levels: Levels, share: float, shift: bool = True) -> Floats:
    """Peaks (m,) of the input channels -> how they are rounded when the loudest is clipped at a share of its peak."""
    most = 2 ** FLOATS[levels.table][0] - 1 if shift else 0
    loudest = peaks.max().clamp(min=2.0**-100)
    shifts = (loudest / peaks.clamp(min=2.0**-120)).log2().round().clamp(0, most).to(torch.int8)
    return Floats(levels, shifts, (loudest * share / levels.top).reshape(1))


def best_rows(weight: Tensor, levels: Levels, wish: Tensor, inputs: Tensor, tried: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scales of the weights' rows that bring inputs (t, m) nearest to what is wished of them (t, n): (n, 1) as stored, and the error."""
    whole, best, scale = fit_scale(weight, levels), torch.full((len(weight),), torch.inf, dtype=torch.float64), torch.empty(0)
    for share in tried:
        one = rounded_scale(whole * share, levels, None)
        error = (inputs @ decode(encode(weight, one, levels, None), one, levels, None).T - wish).double().square().sum(0)
        better = error < best
        scale = torch.where(better[:, None], one, scale) if scale.numel() else one
        best = torch.minimum(error, best)
    return scale, best.sum()


def searched(
    weight: Tensor,
    inputs: Tensor,
    peaks: Tensor,
    tables: tuple[Sequence[Levels], Sequence[Levels]],
    *,
    shift: bool,
    steps: int,
    rounds: int,
) -> tuple[Levels, Tensor, Floats]:
    """Formats to try for weights and inputs -> the weights' levels and scales (n, 1), and how inputs are rounded."""
    wish, tried = inputs @ weight.T, shares(steps)
    feed = pre_shifted(peaks, tables[1][0], 1.0, shift)
    for _ in range(rounds):
        rows = [(levels, *best_rows(weight, levels, wish, feed(inputs), tried)) for levels in tables[0]]
        levels, scale, _ = min(rows, key=lambda row: float(row[2]))
        held = decode(encode(weight, scale, levels, None), scale, levels, None)
        feeds = [pre_shifted(peaks, one, share, shift) for one in tables[1] for share in tried]
        feed = min(feeds, key=lambda one: float((one(inputs) @ held.T - wish).double().square().sum()))
    return levels, scale, feed


@dataclass(frozen=True)
class FloatBits:
    """Level: bits of the weights and of their inputs, 4, 6 or 8."""

    bits: int = 4
    inputs: int = 4

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("inputs", self.inputs)):
            if not formats(bits):
                raise ValueError(f"{name}={bits}: floats have 4, 6 or 8 bits")


@dataclass(frozen=True)
class LLMFP4(Transform):
    """shift: exponents of the input channels' own; steps: clipping maxima that are tried; rounds: of weights and inputs in turn; rows:
    tokens that are looked at."""

    shift: bool = True
    steps: int = 19
    rounds: int = 2
    rows: int = 256

    acts_on = (Linear, Embedding)
    level = FloatBits

    @property
    def wants(self) -> tuple[Sample, Peaks]:  # type: ignore[override]
        """Some inputs, and the largest of each channel."""
        return Sample(self.rows), Peaks()

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: FloatBits) -> Change:
        weight = weights["weight"].reshape(site.matrix).float()
        if isinstance(site.kind, Embedding):
            return Change(hold={site.tensors["weight"]: _nearest(weight, formats(level.bits))})
        inputs, peaks = (stats[kind] for kind in self.wants)
        tables = formats(level.bits), formats(level.inputs)
        levels, scale, feed = searched(weight, inputs, peaks, tables, shift=self.shift, steps=self.steps, rounds=self.rounds)
        inner = Leveled.of(site.shape, levels, encode(weight, scale, levels, None), scale, None, None)
        return Change(hold={site.tensors["weight"]: Floating(inner, feed.levels.table, feed.shifts, feed.scale)})

    def stored(self, site: Site, level: FloatBits) -> int:
        n, m = site.matrix
        return Leveled.bytes_of(n, m, formats(level.bits)[0]) + (0 if isinstance(site.kind, Embedding) else m + 4)


def _nearest(weight: Tensor, tables: Sequence[Levels]) -> Leveled:
    """A table in the format in which its rows, clipped, err least."""
    found = []
    for levels in tables:
        scale = fit_clipped(weight, levels, None)
        codes = encode(weight, scale, levels, None)
        error = float((decode(codes, scale, levels, None) - weight).double().square().sum())
        found.append((error, Leveled.of(tuple(weight.shape), levels, codes, scale, None, None)))
    return min(found, key=lambda one: one[0])[1]
