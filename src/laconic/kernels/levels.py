"""Codes of 1 to 8 bits that name values of a table, and one scale for each group of a row: w is about table[code] * scale.

Tables of a float format hold its values in the order of its codes, the highest bit of a code being the sign: e2m1, e2m3, e3m2, e4m3 (the
variant without infinities) and e5m2, as the OCP Microscaling Formats specification 1.0 (2023), section 5.3, has them; e1m2 and e3m0 are
made alike: even steps, and powers of two alone. A codebook is a rising table of its own for each matrix: uneven steps, small where weights
are dense.
Scales: bf16; e8m0, powers of two of a byte (OCP, section 5.4); e4m3, floats of a byte times one fp32 number for the matrix (NVFP4).
All values of tables are bf16's, so that a product of one with a bf16 number is exact in fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from laconic.kernels.grids import grouped, ungrouped
from laconic.kernels.place import kept

# bits of the exponent and of the mantissa; codes at the end of the positive half that are no numbers
FLOATS = {
    "e2m1": (2, 1, 0),
    "e1m2": (1, 2, 0),
    "e3m0": (3, 0, 0),
    "e2m3": (2, 3, 0),
    "e3m2": (3, 2, 0),
    "e4m3": (4, 3, 1),
    "e5m2": (5, 2, 4),
}
# greatest value of a scale in e4m3
GREATEST = 448.0
# bins in which the weights of a matrix are counted for a codebook, and how often its levels move at most
BINS, ROUNDS = 8192, 200
# weights looked at together
PART = 4 * 1024 * 1024


@dataclass(frozen=True)
class Levels:
    """bits 1 to 8, those of the table where it is a float format; group = weights of a row that share a scale (None: the whole row);
    scales: as they are stored."""

    bits: int
    table: Literal["e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2", "codebook"] = "codebook"
    group: int | None = 64
    scales: Literal["bf16", "e8m0", "e4m3"] = "bf16"

    def __post_init__(self) -> None:
        if self.table != "codebook" and self.table not in FLOATS:
            raise ValueError(f"table={self.table}: tables are codebook, {', '.join(FLOATS)}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: a table has codes of 1 to 8 bits")
        if self.table in FLOATS and self.bits != (bits := 1 + sum(FLOATS[self.table][:2])):
            raise ValueError(f"bits={self.bits}: numbers of {self.table} have {bits} bits")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: a group has at least one weight; leave it out for whole rows")
        if self.scales not in ("bf16", "e8m0", "e4m3"):
            raise ValueError(f"scales={self.scales}: scales are stored as bf16, e8m0 or e4m3")

    @classmethod
    def mxfp4(cls) -> Levels:
        """OCP MXFP4: e2m1 in groups of 32 with a power of two each, 4.25 bits a weight."""
        return cls(4, "e2m1", 32, "e8m0")

    @classmethod
    def nvfp4(cls) -> Levels:
        """NVFP4: e2m1 in groups of 16 with an e4m3 scale each, 4.5 bits a weight."""
        return cls(4, "e2m1", 16, "e4m3")

    @classmethod
    def fp8(cls, group: int | None = None) -> Levels:
        """e4m3 with bf16 scales, by default one a row."""
        return cls(8, "e4m3", group)

    @classmethod
    def codebook(cls, bits: int, group: int | None = 64) -> Levels:
        """2^bits values of the matrix's own, with bf16 scales."""
        return cls(bits, "codebook", group)

    @property
    def signed(self) -> bool:
        """Whether the highest bit of a code is a sign."""
        return self.table != "codebook"

    @property
    def top(self) -> float:
        """What the greatest weight of a group becomes in units of its scale."""
        return 1.0 if self.table == "codebook" else float(values(self.table).abs().nan_to_num(0.0, 0.0).max())

    @property
    def row(self) -> Levels:
        """The same with one group a row."""
        return replace(self, group=None)

    def width(self, m: int) -> int:
        """Weights in a full group of a row of m."""
        return m if self.group is None else min(self.group, m)

    def count(self, m: int) -> int:
        """Groups in a row of m, the ragged last one included."""
        return -(-m // self.width(m)) if m else 0


@kept
def values(table: str) -> Tensor:
    """The values of a float format in the order of its codes, (2^bits,) bf16; NaN for codes that are no numbers."""
    exponent, mantissa, odd = FLOATS[table]
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    half = []
    for e in range(2**exponent):
        for m in range(steps):
            half.append((m / steps) * 2.0 ** (1 - bias) if e == 0 else (1 + m / steps) * 2.0 ** (e - bias))
    half[len(half) - odd :] = [math.nan] * odd
    return torch.tensor([*half, *(-value for value in half)]).bfloat16()


@kept
def _order(table: str) -> tuple[Tensor, Tensor]:
    """Of a float format: its codes by rising value, without a negative zero, and the bounds between neighbours, where what lies in the
    middle goes to the even one of them."""
    numbers = values(table).tolist()
    codes = sorted((c for c, value in enumerate(numbers) if math.isfinite(value) and (value or c == 0)), key=lambda c: numbers[c])
    bounds = []
    for low, high in pairwise(codes):
        middle = torch.tensor((numbers[low] + numbers[high]) / 2)
        bounds.append(middle if low % 2 == 0 else torch.nextafter(middle, torch.tensor(-math.inf)))
    return torch.tensor(codes, dtype=torch.uint8), torch.stack(bounds)


def ranked(levels: Levels, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes by rising value (k,) uint8, these values (k,) fp32, and the bounds between them (k - 1,): a value on one belongs below it."""
    if table is None:
        codes, bounds = _order(levels.table)
        return codes, values(levels.table).float()[codes.long()], bounds
    rising = table.float()
    return torch.arange(len(table), dtype=torch.uint8), rising, (rising[1:] + rising[:-1]) / 2


def whole_of(peak: Tensor, levels: Levels) -> Tensor | None:
    """The one number of a matrix that its scales in e4m3 are multiplied with, (1,) fp32, from its greatest weight: the greatest scale is
    then 448. None where scales are of another kind."""
    if levels.scales != "e4m3":
        return None
    # never so small that it would be lost
    found = (peak.float().reshape(1) / (levels.top * GREATEST)).clamp(min=2.0**-126)
    return torch.where(peak.reshape(1) > 0, found, torch.ones_like(found))


def stored_scales(scale: Tensor, levels: Levels, whole: Tensor | None) -> Tensor:
    """Scales (n, g) fp32, not negative, as they are stored: bf16 or uint8."""
    if levels.scales == "bf16":
        return scale.to(torch.bfloat16)
    if levels.scales == "e8m0":
        # to the nearest power: those that are fitted are powers already
        return scale.float().clamp(min=2.0**-126).log2().round().add(127).clamp(1, 254).to(torch.uint8)
    assert whole is not None
    codes, bounds = _order("e4m3")
    return codes[torch.bucketize(scale.float() / whole, bounds)]


def scales_of(stored: Tensor, levels: Levels, whole: Tensor | None) -> Tensor:
    """The scales (n, g) fp32 that stored ones stand for."""
    if levels.scales == "bf16":
        return stored.float()
    if levels.scales == "e8m0":
        # a power of two is its exponent's bits, but for the least
        return stored.to(torch.int32).bitwise_left_shift(23).clamp(min=1 << 22).view(torch.float32)
    assert whole is not None
    return values("e4m3").float().to(stored.device)[stored.long()] * whole


def rounded_scale(scale: Tensor, levels: Levels, whole: Tensor | None) -> Tensor:
    """A scale with the value that it is stored with."""
    return scales_of(stored_scales(scale, levels, whole), levels, whole)


def fit_scale(weight: Tensor, levels: Levels, whole: Tensor | None = None) -> Tensor:
    """Scales from the greatest weight of each group: it becomes the greatest value of the table, or, where scales are powers of two, has
    the exponent of that value and may be cut (OCP, section 6.3). weight (n, m) -> (n, g) fp32, as stored."""
    peak = grouped(weight, levels).abs().amax(-1)
    if levels.scales == "e8m0":
        power = torch.frexp(peak).exponent - torch.frexp(torch.tensor(levels.top)).exponent
        return rounded_scale(torch.where(peak > 0, torch.ldexp(torch.ones_like(peak), power), 0.0), levels, whole)
    return rounded_scale(peak / levels.top, levels, whole)


def fit_clipped(
    weight: Tensor, levels: Levels, table: Tensor | None, whole: Tensor | None = None, *, importance: Tensor | None = None, steps: int = 8
) -> Tensor:
    """Scales that make the squared error least, each column weighted by importance (m,): of half to all of the fitted one in `steps`,
    or, where scales are powers of two, of it, its half and its double. Shapes as fit_scale."""
    begun, runs = fit_scale(weight, levels, whole), grouped(weight, levels)
    weigh = None if importance is None else grouped(importance[None].clamp(min=0), levels)
    factors = [1.0, 2.0, 0.5] if levels.scales == "e8m0" else [1.0 - 0.5 * i / steps for i in range(steps)]
    scale, best = begun, torch.full_like(begun, torch.inf)
    for factor in factors:
        tried = rounded_scale(begun * factor, levels, whole)
        codes = encode(weight, tried, levels, table)
        error = (grouped(decode(codes, tried, levels, table), levels) - runs).square_()
        loss = (error if weigh is None else error * weigh).sum(-1)
        better = loss < best
        scale, best = torch.where(better, tried, scale), torch.where(better, loss, best)
    return scale


def ratios(weight: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """weight / scale, (n, g, width), zero where the scale is."""
    return grouped(weight, levels) / torch.where(scale > 0, scale, torch.inf)[..., None]


def fit_table(weight: Tensor, scale: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """A codebook for weight (n, m) with scales (n, g): rising, (2^bits,) bf16, of least squared error of the weights, each column weighted
    by importance (m,). Lloyd 1982, 10.1109/TIT.1982.1056489, section IV, method I: levels become the means of what is nearest to them,
    from a density of levels that falls with the cube root of that of the weights (Panter and Dite 1951), until none moves. Weights are
    counted in 8,192 bins; what stands in a bin is taken at its mean."""
    n, m = weight.shape
    limit = 1.0 if levels.scales != "e8m0" else 2.0
    weigh = torch.ones(m) if importance is None else importance.float().clamp(min=0)
    if not float(weigh.sum()) > 0:
        weigh = torch.ones(m)
    mass, moment = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    step = max(1, PART // max(m, 1))
    for i in range(0, n, step):
        at = ratios(weight[i : i + step].float(), scale[i : i + step], levels).clamp(-limit, limit)
        # in parts of the greatest scale, so that squares of tiny ones are not lost
        share = (scale[i : i + step] / scale.max().clamp(min=2.0**-126)).square()[..., None] * grouped(weigh[None] / weigh.max(), levels)
        bins = ((at + limit) * (BINS / (2 * limit))).long().clamp(max=BINS - 1).reshape(-1)
        mass += torch.bincount(bins, share.double().reshape(-1), BINS)
        moment += torch.bincount(bins, (share * at).double().reshape(-1), BINS)
    return lloyd(mass, moment, 2**levels.bits, limit).bfloat16()


def lloyd(mass: Tensor, moment: Tensor, count: int, limit: float) -> Tensor:
    """Levels (count,) fp32, rising, from mass and moment (bins,) fp64 of equal bins over -limit to limit."""
    bins = len(mass)
    centre = (torch.arange(bins, dtype=torch.float64) + 0.5) * (2 * limit / bins) - limit
    dense = mass.pow(1 / 3).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * dense[-1]
    found = centre[torch.searchsorted(dense, wanted).clamp(max=bins - 1)]
    masses, moments = (torch.cat([t.new_zeros(1), t.cumsum(0)]) for t in (mass, moment))
    for _ in range(ROUNDS):
        bounds = torch.searchsorted(centre, (found[1:] + found[:-1]) / 2)
        ends = torch.cat([bounds.new_zeros(1), bounds, bounds.new_tensor([bins])])
        there = masses[ends].diff()
        moved = torch.where(there > 0, moments[ends].diff() / there, found)
        still = bool((moved - found).abs().max() < 1e-6)
        found = moved
        if still:
            break
    return found.float().sort().values


def encode(weight: Tensor, scale: Tensor, levels: Levels, table: Tensor | None) -> Tensor:
    """Codes of the nearest values, (n, m) uint8; what is beyond the table's ends goes there."""
    codes, _, bounds = ranked(levels, table)
    return ungrouped(codes[torch.bucketize(ratios(weight, scale, levels).contiguous(), bounds)], weight.shape[1])


def decode(codes: Tensor, scale: Tensor, levels: Levels, table: Tensor | None) -> Tensor:
    """The weights that codes (n, m) stand for with scales (n, g), fp32."""
    numbers = (values(levels.table) if table is None else table).float().to(codes.device)[codes.long()]
    return ungrouped(grouped(numbers, levels) * scale[..., None], codes.shape[1])
