"""Kangaroo: the first layers of the model draft for the model itself, and both exits are early.

Liu et al. 2024, arXiv:2404.18911, sections 3.1 and 3.2.  Draft: f = layers 1 to l of the model; g = f + MHA(RMSNorm(f)); logits =
head(RMSNorm(g)) with the model's own head: one attention (here with rotary positions) and two norms are all that is added, 4 d^2 + 2 d
numbers. The draft ends after `most` tokens, or behind the first whose top-1 probability is below `eta` (at temperature 1). Judge: layers
l + 1 to L over all of them in one pass, from the same f and the same cache, so that no layer sees a token twice. What stands follows
rejection sampling (Leviathan et al. 2023, arXiv:2211.17192), which at temperature 0 is equality: lossless.
Learned: A = argmin - sum_t sum_v p(v) log q(v), p the whole model's own distribution on text, everything else frozen.
prompt (1, t): one row; a batch is refused.  Sibling: decode.sample.ancestral (one token a pass)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.claim import Card, Paper
from laconic.core.decoder import Body, Decoder, Draw, Round, Stack
from laconic.core.errors import UserError
from laconic.core.transform import Change, Lesson
from laconic.kernels.losses import Divergence
from laconic.kernels.place import device
from laconic.kernels.rotary import rotated
from laconic.kernels.speculation import verdict

CARD = Card(Paper("Liu et al.", 2024, "arXiv:2404.18911", "sections 3.1 and 3.2"), catalogue="kangaroo", sibling="decode.sample.ancestral")

PART = "kangaroo"
EPS = 1e-6
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
CAUSAL: Mix = partial(F.scaled_dot_product_attention, is_causal=True)


class Adapter(nn.Module):
    """g = RMSNorm(f + MHA(RMSNorm(f))). It begins as the early exit alone: the attention adds nothing yet."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def begin(self, generator: torch.Generator) -> None:
        """Values in place of none."""
        for scale in (self.before, self.after):
            nn.init.ones_(scale)
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.o.weight)

    def forward(self, hidden: Tensor, first: int, mix: Mix) -> Tensor:
        """hidden (b, t, d) of tokens from place `first` on; mix: attention over all that came before."""
        x = F.rms_norm(hidden, self.before.shape, self.before, EPS)
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        places = torch.arange(first, first + hidden.shape[1], device=hidden.device)[None]
        mixed = mix(rotated(q, places), rotated(k, places), v)
        out = hidden + self.o(mixed.transpose(1, 2).flatten(2))
        return F.rms_norm(out, self.after.shape, self.after, EPS)


@dataclass(frozen=True)
class Kangaroo(Decoder):
    """tap: layers that draft; eta: the draft ends behind a token that is less sure; most: tokens drafted at most for one pass; steps,
    rate: of learning, Adam, 4 texts a step, the rate falling to zero along a cosine, that of the norms ten times as high, since a model's
    last norm may have scales well above one and nothing behind it can make up for them."""

    lossless: ClassVar[bool] = True
    tap: int = 2
    eta: float = 0.6
    most: int = 6
    steps: int = 320
    rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.tap < 1 or self.most < 1 or self.steps < 1:
            raise ValueError(f"tap={self.tap}, most={self.most} and steps={self.steps} must each be at least 1")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: a probability, 0 (never unsure) to 1; the paper's is 0.6")

    @property
    def lesson(self) -> Lesson:
        return Lesson(
            Divergence(),
            rates=(("weight", self.rate), ("before", 10 * self.rate), ("after", 10 * self.rate)),
            steps=self.steps,
            batch=4,
            decay="cosine",
        )

    def place(self, body: Body, generator: torch.Generator | None) -> Change:
        if self.tap >= body.depth:
            raise UserError(f"tap={self.tap} leaves no layer to judge with, the model has {body.depth}; give a smaller tap")
        # as the model's own, or the most that split its width into pairs
        heads = next(h for h in range(body.heads, 0, -1) if body.width % (2 * h) == 0)
        with torch.device("meta"):
            adapter = Adapter(body.width, heads)
        if generator is not None:
            adapter = adapter.to_empty(device=device())
            adapter.begin(generator)
        return Change(place={PART: adapter})

    def taught(self, parts: Mapping[str, nn.Module], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        return head(parts[PART](hidden, 0, CAUSAL))

    def __call__(self, stack: Stack, prompt: Tensor, *, limit: int, draw: Draw, ends: frozenset[int] = frozenset()) -> Iterator[Round]:
        if prompt.shape[0] != 1:
            raise UserError(f"Kangaroo drafts for one text at a time, here are {prompt.shape[0]}; give them one by one")
        adapter, mix = stack.parts[PART], partial(stack.mix, 0)

        def row(*tokens: int) -> Tensor:
            return torch.tensor([tokens], device=prompt.device)

        # prefill: the adapter's cache is filled beside the model's
        early = stack.rise(prompt, self.tap)
        adapter(early, 0, mix)
        token = draw.pick(draw.odds(stack.answer(prompt, early, self.tap, keep=1).logits[0, -1]))
        stack.settle(prompt.shape[1])
        yield Round(row(token))
        left, owed = limit - 1, early[:, :0]
        while left > 0 and token not in ends:
            path, sure, states = [token], 1.0, early[:, :0]
            guesses: list[Tensor] = []
            while True:
                fresh = stack.rise(row(path[-1]), self.tap)
                states, owed = torch.cat([states, fresh], 1), torch.cat([owed, fresh], 1)
                if len(guesses) == min(self.most, left - 1) or sure < self.eta or (guesses and path[-1] in ends):
                    break
                # with it what the adapter has not seen: the last draft of a round in which all stood
                said = stack.head(adapter(owed, stack.length + states.shape[1] - owed.shape[1], mix)[:, -1])[0]
                owed = owed[:, :0]
                guesses.append(draw.odds(said))
                sure = float(said.float().softmax(-1).max())
                path.append(draw.pick(guesses[-1]))
            logits = stack.answer(row(*path), states, self.tap).logits[0]
            stood, token = verdict(path[1:], guesses, draw.odds(logits), draw)
            stack.settle(stood + 1)
            if stood < len(guesses):
                owed = owed[:, :-1]
            new = [*path[1 : stood + 1], token]
            new = new[: next((i + 1 for i, one in enumerate(new) if one in ends), len(new))]
            token, left = new[-1], left - len(new)
            yield Round(row(*new), len(guesses), stood)
