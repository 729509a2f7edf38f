"""Claims of rounding to nearest in floats of few bits, weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import Bench, duel, judged, on, seen, spread
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.site import Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.kernels.grids import grouped, ungrouped
from laconic.kernels.levels import Levels, encode, fit_scale, values, whole_of
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.floats import Floats


@dataclass(frozen=True)
class Truncate(Transform):
    """The stand-in: every weight goes to the next number towards zero."""

    acts_on = (Linear,)
    level = Levels

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Levels) -> Change:
        weight = weights["weight"].reshape(site.matrix).float()
        whole = whole_of(weight.abs().max(), level)
        scale = fit_scale(weight, level, whole)
        rising = values(level.table).float()[: 2 ** (level.bits - 1)].nan_to_num(0.0).sort().values
        below = rising[torch.bucketize(grouped(weight, level).abs() / scale[..., None], rising, right=True) - 1]
        near = ungrouped(below * scale[..., None], site.matrix[1]) * weight.sign()
        return Change(hold={site.tensors["weight"]: Leveled.of(site.shape, level, encode(near, scale, level, None), scale, whole, None)})

    def stored(self, site: Site, level: Levels) -> int:
        return Floats().stored(site, level)


def _close(transform: Transform, bench: Bench) -> Verdict:
    """The rise of the perplexity in 8 and 6 bits."""
    wrong, numbers = [], {}
    for label, level, most in (("e4m3, one scale a row", Levels.fp8(), 0.005), ("MXFP6, e2m3", Levels(6, "e2m3", 32, "e8m0"), 0.01)):
        found = seen(bench, transform, level)
        numbers[f"{label}: perplexity gap"] = spread([found.gap], "share")
        numbers[f"{label}: KL"] = spread([found.kl], "nats/token")
        if found.gap > most:
            wrong.append(f"{label} raises the perplexity by {found.gap:.2%}, more than {most:.1%}")
    return judged(wrong, numbers)


def _finer(transform: Transform, bench: Bench) -> Verdict:
    """NVFP4 against MXFP4, which has a quarter of a bit less."""
    nv, mx = seen(bench, transform, Levels.nvfp4()), seen(bench, Floats(), Levels.mxfp4())
    return judged(*duel("4-bit floats", [nv], [mx], names=("NVFP4", "MXFP4")))


def _on(name: str, check: str, transform: Transform, lab: Lab) -> Verdict:
    return on(lab, name, partial({"close": _close, "finer": _finer}[check], transform))


PAPER = Paper("Rouhani et al.", 2023, "arXiv:2310.10537", "section 5")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Weights cast to e4m3 raise the perplexity by at most 0.5 %, to MXFP6 by at most 1 %.",
        where=PAPER,
        scale="nano, all matrices of the blocks; no chance in it",
        check=partial(_on, "nano", "close", Floats()),
        broken=partial(_on, "nano", "close", Truncate()),
    ),
    Claim(
        says="Groups of 16 with e4m3 scales have a lower KL and perplexity than groups of 32 with powers of two, for a quarter of a bit.",
        where=PAPER,
        scale="nano, all matrices of the blocks, NVFP4 against MXFP4; no chance in it",
        check=partial(_on, "nano", "finer", Floats()),
        broken=partial(_on, "nano", "finer", Truncate()),
    ),
    Claim(
        says="Groups of 16 with e4m3 scales have a lower KL and perplexity than groups of 32 with powers of two, on a model of others.",
        where=PAPER,
        scale="stories260k on TinyStories, all matrices of the blocks, NVFP4 against MXFP4; no chance in it",
        check=partial(_on, "stories260k", "finer", Floats()),
        broken=partial(_on, "stories260k", "finer", Truncate()),
    ),
)
