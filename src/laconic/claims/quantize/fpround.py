"""Claims of rounding learned on floats, on a denoiser: the grid that nearest rounding has, so the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, gathered, held, tuned
from laconic.claims.quantize.dgq import Shown, better, open_denoiser
from laconic.claims.quantize.flexround import Swapped
from laconic.claims.quantize.fpquant import DRAWS, FLOATS, W4A8, Integers, grid_of, measured, nearest
from laconic.core.claim import Claim, Lab, Measurement, Paper
from laconic.core.packed import Packed
from laconic.core.transform import Layer, Lesson, Transform
from laconic.kernels.splits import nearest as nearest_ranks
from laconic.kernels.splits import numbers
from laconic.methods.quantize.learn.fpround import FPRound

LEARNED = FPRound(rates=(("v", 2e-1),), weigh=0.03, scope=Layer())
ASTRAY = replace(LEARNED, objective=Swapped())


def sized(lesson: Lesson, quick: bool) -> Lesson:
    """20 steps a layer in a quick run, else 40, of 32 states."""
    return replace(lesson, steps=20 if quick else 40, batch=32)


def learned(bench: Bench, method: Transform, lesson: Lesson, seed: int, quick: bool) -> dict[str, Packed]:
    """What a method made to nearest at W4A8, after a lesson, made once."""
    forms: dict[str, Packed] = bench.once(
        ("learned", method, lesson, seed, quick), lambda: tuned(bench, held(bench, method, W4A8, seed), sized(lesson, quick), seed)
    )
    return forms


def after(bench: Bench, method: Transform, lesson: Lesson, seed: int, quick: bool) -> Shown:
    """The same, measured once."""
    found: Shown = bench.once(
        ("after", method, lesson, seed, quick), lambda: measured(bench, learned(bench, method, lesson, seed, quick), seed, quick)
    )
    return found


@gathered
def _below_nearest(ours: Lesson, seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    bench = open_denoiser(lab.quick)
    mine = [after(bench, FLOATS, ours, seed, lab.quick) for seed in lab.draws(seeds)]
    theirs = [nearest(bench, FLOATS, W4A8, seed, lab.quick) for seed in lab.draws(seeds)]
    yield better("W4A8", mine, theirs, ("learned floats", "floats to nearest"))


@gathered
def _below_integers(ours: Lesson, seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    """Both learn, on the same states and for as many steps."""
    bench = open_denoiser(lab.quick)
    mine = [after(bench, FLOATS, ours, seed, lab.quick) for seed in lab.draws(seeds)]
    theirs = [after(bench, Integers(), LEARNED, seed, lab.quick) for seed in lab.draws(seeds)]
    yield better("W4A8", mine, theirs, ("learned floats", "learned whole numbers"))


def _moved(form: Packed, by: float = 1.0) -> float:
    """Share of its weights, times a factor, that are not numbers of the grid."""
    grid = grid_of(form)
    assert grid is not None
    weight = form.dense() * by
    return float((numbers(nearest_ranks(weight / grid.scale, grid.split), grid.split) * grid.scale != weight).float().mean())


# the stand-in: weights a hundredth off
_off = partial(_moved, by=1.01)


@gathered
def _on_the_grid(off: Callable[[Packed], float], seeds: Sequence[int], lab: Lab) -> Iterator[Duel]:
    bench = open_denoiser(lab.quick)
    for seed in lab.draws(seeds):
        before, now = held(bench, FLOATS, W4A8, seed), learned(bench, FLOATS, LEARNED, seed, lab.quick)
        away = [off(form) for form in now.values()]
        changed = [float((now[name].dense() != form.dense()).float().mean()) for name, form in before.items()]
        wrong = [f"{sum(share > 0 for share in away)} matrices have weights off the grid"] if any(away) else []
        wrong += [] if any(changed) else ["nothing was learned"]
        numbers_of: Mapping[str, Measurement] = {
            f"draw {seed}: weights off the grid": Measurement(sum(away) / len(away), "share", len(away)),
            f"draw {seed}: weights that are not rounded to nearest": Measurement(sum(changed) / len(changed), "share", len(changed)),
        }
        yield wrong, dict(numbers_of)


PAPER = Paper("Chen et al.", 2024, "arXiv:2408.06995", "section 5")
SCALE = "denoiser, matrices of the blocks in 4 bits and inputs in 8, one scale a tensor, 40 steps a layer (quick: 20)"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Floats of 4 bits whose rounding was learned have a lower KL than rounded to nearest, and nearer images.",
        where=PAPER,
        scale=SCALE + DRAWS,
        check=partial(_below_nearest, LEARNED, SEEDS),
        broken=partial(_below_nearest, ASTRAY, ONE),
    ),
    Claim(
        says="Where rounding is learned for both, floats of 4 bits have a lower KL than whole numbers, and nearer images.",
        where=PAPER,
        scale=SCALE + DRAWS,
        check=partial(_below_integers, LEARNED, SEEDS),
        broken=partial(_below_integers, ASTRAY, ONE),
    ),
    Claim(
        says="All weights lie exactly on the grid of floats once they are hard, and not all where rounding to nearest put them.",
        where=Paper("Chen et al.", 2024, "arXiv:2408.06995", "section 4"),
        scale=SCALE + DRAWS,
        check=partial(_on_the_grid, _moved, SEEDS),
        broken=partial(_on_the_grid, _off, ONE),
    ),
)
