"""Which drafted tokens stand, so that what stands has the distribution of the model that judges, whatever the draft's was."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from laconic.core.decoder import Draw


def kept(truth: Tensor, guess: Tensor) -> Tensor:
    """The chance that a token drawn from `guess` (v,) stands before `truth` (v,): min(1, p / q); 0 where it could not have been drawn.
    Leviathan et al. 2023, arXiv:2211.17192, section 2.3."""
    return (truth / guess.where(guess > 0, 1.0)).clamp(max=1.0).where(guess > 0, 0.0)


def residual(truth: Tensor, guess: Tensor) -> Tensor:
    """What a token that stands in place of a refused one is drawn from: max(0, p - q), normalised. The same section."""
    left = (truth - guess).clamp(min=0.0)
    total = left.sum(-1, keepdim=True)
    # to rounding the same distribution: a refusal was rounding too
    return (left / total.where(total > 0, 1.0)).where(total > 0, truth)


def verdict(drafted: Sequence[int], guesses: Sequence[Tensor], truths: Tensor, draw: Draw) -> tuple[int, int]:
    """How many of the drafted tokens stand, and the token after them. guesses: what each was drawn from, (v,); truths (n + 1, v): what
    the judge would have drawn from at each place, the one after the last included."""
    for i, (token, guess) in enumerate(zip(drafted, guesses, strict=True)):
        if not draw.happens(float(kept(truths[i], guess)[token])):
            return i, draw.pick(residual(truths[i], guess))
    return len(drafted), draw.pick(truths[len(drafted)])
