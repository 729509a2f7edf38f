"""Claims of AdaRound: the same held grid as rounding to nearest, so the same bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from laconic.claims.lab import ONE, SEEDS
from laconic.claims.quantize.flexround import ADA, DRAWS, GROUPS, IMAGES, ROWS, Swapped, against
from laconic.core.claim import Claim, Paper

ASTRAY = replace(ADA, objective=Swapped())
PAPER = Paper("Nagel et al.", 2020, "arXiv:2004.10568", "section 5, tables 2 and 7")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="AdaRound's KL and block output error are at most 1 / 1.3 of those of rounding to nearest, on a model trained by others.",
        where=PAPER,
        scale=f"stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits, one scale a row, block by block, {DRAWS}",
        check=partial(against, "stories260k", ADA, None, 1.3, ROWS, SEEDS),
        broken=partial(against, "stories260k", ASTRAY, None, 1.3, ROWS, ONE),
    ),
    Claim(
        says="AdaRound's KL and block output error are below those of rounding to nearest on the same grid.",
        where=PAPER,
        scale=f"nano, all matrices of the blocks, 4 and 3 bits in groups of 64, block by block, {DRAWS}",
        check=partial(against, "nano", ADA, None, 1.0, GROUPS, SEEDS),
        broken=partial(against, "nano", ASTRAY, None, 1.0, GROUPS, ONE),
    ),
    Claim(
        says="AdaRound's KL and layer output error are below those of rounding to nearest on the same grid, on a residual network.",
        where=PAPER,
        scale=f"resnet20 on CIFAR-10, all convolutions and the linear layer, 4 and 3 bits, one scale a channel, layer by layer, {IMAGES}",
        check=partial(against, "resnet20", ADA, None, 1.0, ROWS, SEEDS),
        broken=partial(against, "resnet20", ASTRAY, None, 1.0, ROWS, ONE),
    ),
)
