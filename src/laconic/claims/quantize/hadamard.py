"""Claims of the online Hadamard rotation, at the output projections of a Mamba: the same grids, so the same bytes."""

from __future__ import annotations

from functools import partial

from laconic.claims.lab import ONE, SEEDS
from laconic.claims.quantize.mambaquant import LOUD, PLAIN, TURNED, ordered
from laconic.core.claim import Claim, Paper

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="With Hadamard rotations W8A8, W4A8 and W8A6 have a lower KL than with rounding to nearest alone.",
        where=Paper("Ashkboos et al.", 2024, "arXiv:2404.00456", "section 5"),
        scale=LOUD,
        check=partial(ordered, chain={"Hadamard": TURNED, "RTN": PLAIN}, seeds=SEEDS),
        broken=partial(ordered, chain={"no rotation in its place": PLAIN, "RTN": PLAIN}, seeds=ONE),
    ),
)
