"""Claim of PTQ1.61's quantization preprocessing: weights that were moved first against weights as they were, all else alike."""

from __future__ import annotations

from functools import partial

from laconic.claims.lab import ONE, SEEDS
from laconic.claims.quantize.ptq161 import LEARNED, SCALES, check, paper, scaled, whole
from laconic.core.claim import Claim

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="In the same bytes, weights that were moved first give a lower KL.",
        where=paper("section 3.4, table 7"),
        scale=SCALES["nano"],
        check=partial(check, "nano", partial(whole, False), partial(scaled, LEARNED), ("moved first", "as they were"), SEEDS),
        broken=partial(check, "nano", partial(whole, True), partial(scaled, LEARNED), ("moved first", "as they were"), ONE),
    ),
    Claim(
        says="In the same bytes, weights that were moved first give a lower KL, on a model trained by others.",
        where=paper("section 3.4, table 7"),
        scale=SCALES["stories260k"],
        check=partial(check, "stories260k", partial(whole, False), partial(scaled, LEARNED), ("moved first", "as they were"), SEEDS),
        broken=partial(check, "stories260k", partial(whole, True), partial(scaled, LEARNED), ("moved first", "as they were"), ONE),
    ),
)
