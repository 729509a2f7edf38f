"""Claims of FlexRound: against AdaRound on the same held grid, rows, steps and bytes; both against rounding to nearest there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from laconic.claims.lab import (
    ONE,
    SEEDS,
    Bench,
    Found,
    block_error,
    held,
    judged,
    measure,
    on,
    seen,
    site_error,
    spread,
    tuned,
)
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Packed
from laconic.core.transform import Lesson, Objective, Transform
from laconic.kernels.grids import Grid, grouped
from laconic.kernels.losses import SquaredError
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.adaround import AdaRound
from laconic.methods.quantize.round.flexround import FlexRound
from laconic.methods.quantize.round.rtn import RTN

# all begin on the same grid: ranges shrunk to the least squared error of the weights, as both papers do
NEAREST = RTN(clip=True)
# each at the best of some ten settings on the search part of stories260k at 3 bits in 100 steps: FlexRound's rates 0.003 to 0.03, constant
# or falling; AdaRound's 0.01 to 0.4, constant or falling, lambda 0.001 to 0.1
FLEX = FlexRound(rates=(("s1", 3e-3), ("s2", 2e-2), ("s3", 3e-3), ("s4", 3e-3)), decay="cosine")
ADA = AdaRound(rates=(("v", 2e-1),), weigh=0.03)


@dataclass(frozen=True)
class Swapped(Objective):
    """The stand-in: every sample must meet what the original gives for another."""

    name = "squared error to another sample"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        return SquaredError()(output, target.roll(target.shape[0] // 2, 0), mask)


ASTRAY = replace(FLEX, objective=Swapped())


@dataclass(frozen=True)
class After:
    """A model after a lesson: the measured whole, and the squared error of its blocks' (or layers') outputs."""

    found: Found
    error: float


def small(bench: Bench, quick: bool) -> Bench:
    """Rows of 128 tokens, so that a step takes little; 16 or 64 of them. Images: 128 or 512."""
    text = not bench.pool.is_floating_point()
    return replace(bench, pool=bench.pool[:, :128] if text else bench.pool, rows=(16 if quick else 64) if text else (128 if quick else 512))


def sized(bench: Bench, lesson: Lesson, quick: bool) -> Lesson:
    """As many steps for all: 100 in a quick run (50 of images or of nano), else 400; 4 rows or 32 images a step."""
    text = not bench.pool.is_floating_point()
    return replace(lesson, steps=(100 if bench.name == "stories260k" else 50) if quick else 400, batch=4 if text else 32)


def learned(bench: Bench, lesson: Lesson, level: Grid, seed: int, quick: bool, begin: Transform = NEAREST) -> dict[str, Packed]:
    """The forms after a lesson that goes on from what `begin` made, made once."""
    own, lesson = small(bench, quick), sized(bench, lesson, quick)
    forms: dict[str, Packed] = bench.once(
        ("rounded", lesson, level, seed, own.rows, begin), lambda: tuned(own, held(bench, begin, level), lesson, seed)
    )
    return forms


def error(bench: Bench, forms: dict[str, Packed]) -> float:
    """Of blocks where there are some, else of layers."""
    blocks = any(segment.name for segment in bench.source.anatomy.segments())
    return block_error(bench, forms) if blocks else site_error(bench, forms)


def after(bench: Bench, lesson: Lesson, level: Grid, seed: int, quick: bool, begin: Transform = NEAREST) -> After:
    """A lesson's result, measured once."""

    def make() -> After:
        forms = learned(bench, lesson, level, seed, quick, begin)
        return After(measure(bench, forms), error(bench, forms))

    found: After = bench.once(("after", sized(bench, lesson, quick), level, seed, quick, begin), make)
    return found


def numbers_of(label: str, name: str, found: Sequence[After]) -> dict[str, Measurement]:
    """What a verdict says of one method."""
    return {
        f"{label}: KL, {name}": spread([one.found.kl for one in found], "nats/prediction"),
        f"{label}: output error, {name}": spread([one.error for one in found], "share"),
        f"{label}: same first choice as the original, {name}": spread([one.found.agreement for one in found], ""),
        f"{label}: bytes, {name}": spread([float(one.found.bytes) for one in found], "bytes"),
    }


def beaten(label: str, ours: Sequence[After], theirs: Sequence[After], names: tuple[str, str], factor: float = 1.0) -> list[str]:
    """What is wrong with "ours has at most 1 / factor of the KL and the output error of theirs, in the mean over draws"."""
    wrong = []
    if statistics.fmean(one.found.kl for one in ours) * factor > statistics.fmean(one.found.kl for one in theirs):
        wrong.append(f"{label}: KL of {names[0]} is above that of {names[1]}" + (f" / {factor:g}" if factor != 1 else ""))
    if statistics.fmean(one.error for one in ours) * factor > statistics.fmean(one.error for one in theirs):
        wrong.append(f"{label}: output error of {names[0]} is above that of {names[1]}" + (f" / {factor:g}" if factor != 1 else ""))
    return wrong


def nearest(bench: Bench, level: Grid, method: Transform = NEAREST, seed: int = 0) -> After:
    """What nothing was learned of: rounding to nearest on the same grid, or another method."""
    forms = held(bench, method, level, seed)
    key = ("nearest", level, method, seed if method.wants else 0)
    found: After = bench.once(key, lambda: After(seen(bench, method, level, seed), error(bench, forms)))
    return found


def _against(
    ours: Lesson, rival: Lesson | None, factor: float, levels: Sequence[Grid], seeds: Sequence[int], quick: bool, bench: Bench
) -> Verdict:
    wrong: list[str] = []
    numbers: dict[str, Measurement] = {}
    names = (type(ours).__name__, "round to nearest" if rival is None else type(rival).__name__)
    for level in levels[-1:] if quick else levels:
        label = f"{level.bits} bits, {'one scale a row' if level.group is None else f'groups of {level.group}'}"
        draws = seeds[:1] if quick else seeds
        mine = [after(bench, ours, level, seed, quick) for seed in draws]
        theirs = [nearest(bench, level)] if rival is None else [after(bench, rival, level, seed, quick) for seed in draws]
        wrong += beaten(label, mine, theirs, names, factor)
        numbers |= numbers_of(label, names[0], mine) | numbers_of(label, names[1], theirs)
    return judged(wrong, numbers)


def against(
    name: str, ours: Lesson, rival: Lesson | None, factor: float, levels: Sequence[Grid], seeds: Sequence[int], lab: Lab
) -> Verdict:
    """A lesson against another, or against rounding to nearest."""
    return on(lab, name, partial(_against, ours, rival, factor, levels, lab.draws(seeds), lab.quick))


def _moved(ours: Lesson, seeds: Sequence[int], quick: bool, bench: Bench) -> Verdict:
    """Share of weights whose code is more than one step from where they stand on the learned grid, and how large they are."""
    level = Grid(4, None)
    shares, sizes = [], []
    for seed in seeds[:1] if quick else seeds:
        moved = total = 0
        large = whole = 0.0
        for name, form in learned(bench, ours, level, seed, quick).items():
            assert isinstance(form, Grouped)
            codes, scale, zero = form.plain()
            weight = grouped(bench.source.read(name).float().reshape(form.matrix), level)
            stands = (weight / scale[..., None] + zero[..., None]).clamp(0, 2**level.bits - 1)
            # in units of each matrix's mean, since matrices are of unlike size
            unit = weight.abs() / weight.abs().mean()
            far = (grouped(codes.float(), level) - stands).abs() > 1
            moved, total = moved + int(far.sum()), total + far.numel()
            large, whole = large + float(unit[far].sum()), whole + float(unit.sum())
        shares.append(moved / total)
        sizes.append(large / max(moved, 1) / (whole / total))
    numbers = {
        "share of weights that move further than to a neighbour": spread(shares, ""),
        "their mean magnitude over that of all": spread(sizes, ""),
    }
    wrong = ["no weight moves further than to a neighbour"] if min(shares) == 0 else []
    if min(sizes) <= 1:
        wrong.append("those that do are not larger than the mean")
    return judged(wrong, numbers)


def _moves(name: str, ours: Lesson, seeds: Sequence[int], lab: Lab) -> Verdict:
    return on(lab, name, partial(_moved, ours, lab.draws(seeds), lab.quick))


PAPER = Paper("Lee et al.", 2023, "arXiv:2306.00317", "section 4, tables 2 to 5")
RULE = Paper("Lee et al.", 2023, "arXiv:2306.00317", "section 3.2, figure 3")
ROWS = (Grid(4, None), Grid(3, None))
GROUPS = (Grid(4, 64), Grid(3, 64))
DRAWS = "400 steps of 4 rows of 128 tokens, 3 draws of the calibration rows (quick: 3 bits, 100 steps, of nano 50; 1 draw)"
IMAGES = "400 steps of 32 images, 3 draws of 512 images (quick: 3 bits, 50 steps, 1 draw of 128)"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="On a model trained by others, FlexRound's KL and block output error are at most AdaRound's, steps and grid being equal.",
        where=PAPER,
        scale=f"stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits, one scale a row, block by block, {DRAWS}",
        check=partial(against, "stories260k", FLEX, ADA, 1.0, ROWS, SEEDS),
        broken=partial(against, "stories260k", ASTRAY, ADA, 1.0, ROWS, ONE),
    ),
    Claim(
        says="On the same grid, rows and steps, FlexRound's KL and block output error are at most AdaRound's.",
        where=PAPER,
        scale=f"nano, all matrices of the blocks, 4 and 3 bits in groups of 64, block by block, {DRAWS}",
        check=partial(against, "nano", FLEX, ADA, 1.0, GROUPS, SEEDS),
        broken=partial(against, "nano", ASTRAY, ADA, 1.0, GROUPS, ONE),
    ),
    Claim(
        says="On the same grid, images and steps, FlexRound's KL and layer output error are at most AdaRound's, on a residual network.",
        where=PAPER,
        scale=f"resnet20 on CIFAR-10, all convolutions and the linear layer, 4 and 3 bits, one scale a channel, layer by layer, {IMAGES}",
        check=partial(against, "resnet20", FLEX, ADA, 1.0, ROWS, SEEDS),
        broken=partial(against, "resnet20", ASTRAY, ADA, 1.0, ROWS, ONE),
    ),
    Claim(
        says="FlexRound's KL and block output error are at most 1 / 1.3 of those of rounding to nearest on the same grid.",
        where=PAPER,
        scale=f"stories260k on TinyStories, all matrices of the blocks, 4 and 3 bits, one scale a row, block by block, {DRAWS}",
        check=partial(against, "stories260k", FLEX, None, 1.3, ROWS, SEEDS),
        broken=partial(against, "stories260k", ASTRAY, None, 1.3, ROWS, ONE),
    ),
    Claim(
        says="Some weights move further than to a neighbouring code, and they are larger than the mean weight of their matrix.",
        where=RULE,
        scale=f"stories260k on TinyStories, all matrices of the blocks, 4 bits, one scale a row, block by block, {DRAWS}",
        check=partial(_moves, "stories260k", FLEX, SEEDS),
        # what only ever chooses between neighbours
        broken=partial(_moves, "stories260k", ADA, ONE),
    ),
)
