"""Token by token: each one drawn given all before it, the reference that other decoders are compared with.

Graves 2013, arXiv:1308.0850, section 2: x_t+1 ~ Pr(x_t+1 | y_t), fed back as the next input; section 5.4 draws from a sharpened
distribution, here softmax(logits / temperature), at 0 the likeliest token (greedy decoding). One pass through all layers a token.
prompt (b, t).  Sibling: decode.draft.kangaroo (several tokens a pass, the same distribution)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laconic.core.claim import Card, Paper
from laconic.core.decoder import Decoder, Draw, Round, Stack

CARD = Card(Paper("Graves", 2013, "arXiv:1308.0850", "sections 2 and 5.4"), catalogue="", sibling="decode.draft.kangaroo")


@dataclass(frozen=True)
class Ancestral(Decoder):
    """Every token costs one pass. Rows of a batch go on until all of them have come to an end, which is then repeated."""

    lossless: ClassVar[bool] = True

    def __call__(self, stack: Stack, prompt: Tensor, *, limit: int, draw: Draw, ends: frozenset[int] = frozenset()) -> Iterator[Round]:
        step = prompt
        for _ in range(limit):
            odds = draw.odds(stack.answer(step, keep=1).logits[:, -1])
            stack.settle(step.shape[1])
            chosen = [draw.pick(row) for row in odds]
            if step is not prompt:
                chosen = [before if before in ends else token for before, token in zip(step[:, -1].tolist(), chosen, strict=True)]
            step = torch.tensor(chosen, device=prompt.device)[:, None]
            yield Round(step)
            if ends.issuperset(chosen):
                return
