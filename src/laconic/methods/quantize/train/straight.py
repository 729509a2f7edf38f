"""Straight-through tuning: codes and step sizes of the whole compressed model learned together, against the original's predictions.

Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2, eq. 1-3: v_bar = round(clip(v / s)), v_hat = v_bar s, the gradient of v_hat passes the
rounding to v inside the clipping range, and s is learned with it; the objective is the KL divergence from the original's predictions
(Hinton et al. 2015, arXiv:1503.02531), as Liu et al. 2023 (LLM-QAT), arXiv:2305.17888, section 2.2, train quantized language models.
It begins with what other methods held, keeps every form and every byte, and works on calibration inputs alone. v is counted in steps of its
scale, and s as a factor of the scale it began with, so that one rate serves all layers.
Memory: four fp32 numbers a weight (position, gradient, two moments) beside the model.
Sibling: quantize.round.gptq (the same form, rounded layer by layer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from laconic.core.claim import Card, Paper
from laconic.core.transform import Lesson, Objective
from laconic.kernels.losses import Divergence

CARD = Card(Paper("Esser et al.", 2020, "arXiv:1902.08153", "section 2, eq. 1-3"), catalogue="", sibling="quantize.round.gptq")


KL = Divergence()


@dataclass(frozen=True)
class Straight(Lesson):
    """Defaults: 96 steps of 4 sequences by Adam, rates falling to zero along a cosine; position in grid steps, step in logarithms, table
    (of vectors) in sizes of its entries. Most of the gain is that of the steps; positions of 0.01 and more move codes faster than so few
    sequences can tell good from bad."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("position", 5e-3), ("step", 3e-3), ("table", 1e-2))
    steps: int = 96
    batch: int = 4
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    narrow: ClassVar[bool] = True
