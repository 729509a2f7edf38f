"""AdaDim: groups along the inputs of an output channel, as usual, or along the outputs of an input channel, whichever errs less.

Heo et al. 2023, arXiv:2309.15531, section 3: a loud input channel makes the weights that meet it sensitive. In a group within an output
channel ("per-OC") they share a scale with all others, in one within an input channel ("per-IC") with each other only; where an output
channel is the sensitive one, it is the other way round. So each layer is rounded in both ways and keeps argmin ||W X - W_q X||^2, that is
tr(dW G dW^T), of the layer itself ("layer itself" of the released code, which may also look at attention or MLP as a whole); inputs are
those that the layers before it give once they are rounded. What follows is not looked at: a quiet key that meets a loud query counts as
little as it weighs.
weight (n, m), gram (m, m) -> codes, scale and zero of (n, m), or of its transpose (m, n), held as Transposed.  GPTQ's walk over columns
fits a column's groups when it reaches it. Where both ways take unlike bytes (a group that does not divide both sides), groups run along
the inputs, which the Change's notes say.  Sibling: quantize.round.gptq (along the inputs everywhere)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Transposed
from laconic.core.site import Linear, Site
from laconic.core.statistic import Gram
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.obs import Factor, inverse_factor, output_error, remarks, round_columns, round_within_columns
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.rtn import round_to_nearest

CARD = Card(Paper("Heo et al.", 2023, "arXiv:2309.15531", "section 3"), catalogue="adadim", sibling="quantize.round.gptq")


def per_output(weight: Tensor, grid: Grid, factor: Factor | None, block: int) -> Packed:
    """weight (n, m) rounded in groups of a row: to nearest, or, with a factor, by GPTQ's walk."""
    rounded = round_to_nearest(weight, grid) if factor is None else round_columns(weight, factor, [grid], block=block)[0]
    return Grouped.of(tuple(weight.shape), grid, *rounded)


def per_input(weight: Tensor, grid: Grid, factor: Factor | None, block: int) -> Packed:
    """As `per_output`, in groups of a column."""
    turned = weight.T.contiguous()
    rounded = round_to_nearest(turned, grid) if factor is None else round_within_columns(weight, factor, grid, block=block)
    return Transposed(Grouped.of(tuple(turned.shape), grid, *rounded))


@dataclass(frozen=True)
class AdaDim(Transform):
    """level: a Grid. groups: chosen by error, or within output or input channels everywhere; compensate: GPTQ's walk over columns in place
    of rounding to nearest, with its damping and block."""

    groups: Literal["adaptive", "output", "input"] = "adaptive"
    compensate: bool = True
    damping: float = 0.01
    block: int = 128

    acts_on = (Linear,)
    level = Grid
    wants = (Gram(),)

    def __post_init__(self) -> None:
        if self.groups not in ("adaptive", "output", "input"):
            raise ValueError(f"groups={self.groups}: groups are adaptive, output or input")

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Grid) -> Change:
        return next(self.several(site, weights, stats, [level]))

    def several(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, levels: Sequence[Grid]) -> Iterator[Change]:
        """All levels with one factorization."""
        weight, gram = weights["weight"].reshape(site.matrix).float(), stats[Gram()]
        factor = inverse_factor(gram, self.damping) if self.compensate else None
        notes = () if factor is None else remarks(site.name, [factor], self.damping, "were rounded to nearest")
        for level in levels:
            ways = [way for name, way in (("output", per_output), ("input", per_input)) if self.groups in ("adaptive", name)]
            said = notes
            if len(ways) > 1 and len(set(self._bytes(site, level))) > 1:
                ways = ways[:1]
                sizes = "{:,} and {:,}".format(*self._bytes(site, level))
                said = (*notes, f"{site.name}: groups of {level.group} along inputs or outputs take {sizes} bytes; they run along inputs")
            forms = [way(weight, level, factor, self.block) for way in ways]
            yield Change(hold={site.tensors["weight"]: min(forms, key=lambda form: float(_error(form, weight, gram)))}, notes=said)

    def stored(self, site: Site, level: Grid) -> int:
        return self._bytes(site, level)[self.groups == "input"]

    def _bytes(self, site: Site, level: Grid) -> tuple[int, int]:
        """With groups within output and within input channels."""
        n, m = site.matrix
        return Grouped.bytes_of(n, m, level), Grouped.bytes_of(m, n, level)


def _error(form: Packed, weight: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error, summed over the outputs."""
    return output_error(form.dense() - weight, gram).double().sum()
