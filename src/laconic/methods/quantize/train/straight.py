"""Straight-through tuning: codes and step sizes of the whole compressed model learned together, against the original's predictions.

Esser et al. 2020 (LSQ), arXiv:1902.08153, section 2, eq. 1-3: v_bar = round(clip(v / s)), v_hat = v_bar s, the gradient of v_hat passes the
rounding to v inside the clipping range, and s is learned with it; the objective is the KL divergence from the original's predictions
(Hinton et al. 2015, arXiv:1503.02531), as Liu et al. 2023 (LLM-QAT), arXiv:2305.17888, section 2.2, train quantized language models.
Calibration text is short and soon learned by heart. So `copies` of each row are added in which a share of the tokens is what the original
itself would have written there, drawn from its predictions (Bengio et al. 2015, scheduled sampling, arXiv:1506.03099, section 2.4); what is
to be met is the original's prediction for that text. No other text is needed.
It begins with what other methods held, keeps every form and every byte, and works on calibration inputs alone. v is counted in steps of its
scale, and s as a factor of the scale it began with, so that one rate serves all layers.
Memory: four fp32 numbers a weight (position, gradient, two moments) beside the model.
Sibling: quantize.round.gptq (the same form, rounded layer by layer)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.transform import Lesson, Objective
from laconic.kernels.losses import Divergence

CARD = Card(Paper("Esser et al.", 2020, "arXiv:1902.08153", "section 2, eq. 1-3"), catalogue="", sibling="quantize.round.gptq")


KL = Divergence()


def rewritten(tokens: Tensor, logits: Tensor, count: int, share: float, generator: torch.Generator) -> Tensor:
    """tokens (t,), logits (t, v): what is predicted behind each of them -> (count, t), each token but the first replaced, with probability
    `share`, by one drawn from what was predicted for its place."""
    drawn = torch.multinomial(logits[:-1].float().softmax(-1), count, replacement=True, generator=generator).T
    new = torch.rand(drawn.shape, generator=generator) < share
    return torch.cat([tokens[:1].expand(count, 1), torch.where(new, drawn.to(tokens.dtype), tokens[1:])], 1)


@dataclass(frozen=True)
class Straight(Lesson):
    """Defaults: 128 steps of 4 sequences by Adam, rates falling to zero along a cosine; position in grid steps, step in logarithms, table
    (of vectors) in sizes of its entries. Most of the gain is that of the steps; positions of 0.01 and more move codes faster than so few
    sequences can tell good from bad. copies: at most so many varied rows of each calibration row, and no more rows than the steps see;
    replaced: share of their tokens that is drawn anew."""

    objective: Objective = KL
    rates: tuple[tuple[str, float], ...] = (("position", 5e-3), ("step", 3e-3), ("table", 1e-2))
    steps: int = 128
    batch: int = 4
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    narrow: ClassVar[bool] = True
    copies: int = 2
    replaced: float = 0.3

    def __post_init__(self) -> None:
        if self.copies < 0 or not 0 <= self.replaced <= 1:
            raise ValueError(f"copies={self.copies}, replaced={self.replaced}: copies are counted, and the share of new tokens is 0 to 1")

    def varied(self, inputs: Tensor, predictions: Callable[[], Iterator[Tensor]], room: int, generator: torch.Generator) -> Tensor:
        wanted = min(self.copies * len(inputs), self.steps * self.batch - len(inputs), room)
        if wanted <= 0 or not self.replaced:
            return inputs[:0]
        # every row gets its first copy before one gets its second
        counts = [wanted // len(inputs) + (i < wanted % len(inputs)) for i in range(len(inputs))]
        rows = zip(inputs, counts, chain.from_iterable(predictions()), strict=True)
        made = [rewritten(row, logits, count, self.replaced, generator) for row, count, logits in rows if count]
        return torch.cat(made)
