"""Best practices of learned rounding: what a study of it varies, one switch each, and what comes best as the default.

Yvinec et al. 2023, arXiv:2308.07662 (Gradient-Based Post-Training Quantization: Challenging the Status Quo), abstract:
W~ = s (c + d - z),  c the code below the weight,  d = (2 r - 1) h(V) - (r - 1): from 0 to 1 where r (`reach`) is 1, as in AdaRound, from -1
to 2 where it is 2.  weight, V (n, m) in groups of the grid that is held, s (n, g).
By the study these matter little: which weights have a V (`share`, `among`; the others stay rounded to nearest), noise on the inputs of
layers (`noise`, in their standard deviations), and the calibration data, which the pipeline is given.  These matter: the loss
(`objective`), degrees of freedom (`reach`; a rate for `step`, the logarithm of a factor of s), the grid, the function h (`soft`), the
optimiser and its schedule.
h is `rectified`, AdaRound's sigmoid, stretched and cut; `sigmoid`; `cosine`, (1 - cos(pi V)) / 2; or none (`straight`): d is V in steps,
rounded, its gradient passing as it is.  The others are driven to whole steps by AdaRound's penalty, `weigh` in proportion to the error.
A grid may be uneven too: a step then leads from one level that is held to the next (floats, Lloyd-Max).  Not here: tables of powers of even
steps; mixed samples, whose target nothing knows inside a block; biases, which no form of a matrix holds; and the paper's mixed precision by
importance, in whose place a `Search` prices layers.  Only the abstract was followed: values of the defaults are ours.
Sibling: quantize.round.adaround (one step up or down, scales stay)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.grids import as_stored, grouped, through, ungrouped
from laconic.kernels.levels import decode, ranked, ratios, rounded_scale
from laconic.kernels.losses import SquaredError
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.adaround import CLEAR, indecision, rectified, unrectified

CARD = Card(
    Paper("Yvinec et al.", 2023, "arXiv:2308.07662", "abstract"),
    catalogue="gradient-ptq-practice",
    sibling="quantize.round.adaround",
    exceptions={
        "a soft form computes what it stores": "h(V) lies between steps until the penalty has driven it to one",
    },
)

# h(V) and the V that it is of
SOFT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rectified": (rectified, unrectified),
    "sigmoid": (torch.sigmoid, lambda h: h.clamp(CLEAR, 1 - CLEAR).logit()),
    "cosine": (lambda v: (1 - (math.pi * v).cos()) / 2, lambda h: (1 - 2 * h).clamp(-1, 1).acos() / math.pi),
}


def furthest(score: Tensor, share: float) -> Tensor:
    """Of numbers, this share of those that are not infinitely low, the highest; as score, bool."""
    count = max(1, round(share * int(score.isfinite().sum())))
    found = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    found[score.flatten().topk(count).indices] = True
    return found.reshape(score.shape)


class Positions(nn.Module):
    """Where weights stand among the codes 0 to `top`, in steps. Of (n, g, width): codes, those that are held; wished, where each weight
    would stand; size of each weight, minus infinity for what fills a ragged end. v (free weights,)."""

    codes: Tensor
    free: Tensor
    low: Tensor
    span: Tensor

    def __init__(self, codes: Tensor, wished: Tensor, size: Tensor, top: int, lesson: Practice) -> None:
        super().__init__()
        self.soft, self.weigh = lesson.soft, lesson.weigh
        # as near to the weight as the held code stays the nearest
        begin = codes + (wished - codes).clamp(CLEAR - 0.5, 0.5 - CLEAR)
        score = size
        if lesson.among == "near":
            score = (begin - codes).abs()
        elif lesson.among == "random":
            score = torch.rand(codes.shape, generator=torch.Generator().manual_seed(codes.numel())).to(codes.device)
        free = furthest(score.masked_fill(size.isinf(), -torch.inf), lesson.share)
        low, high = ((begin.floor() + by).clamp(0, top)[free] for by in (1 - lesson.reach, lesson.reach))
        for name, tensor in (("codes", codes), ("free", free), ("low", low), ("span", high - low)):
            self.register_buffer(name, tensor)
        away = begin[free] - low
        straight = self.soft == "straight"
        self.v = nn.Parameter(away if straight else SOFT[self.soft][1]((away / self.span.clamp(min=1)).clamp(0, 1)))

    def _steps(self) -> Tensor:
        if self.soft == "straight":
            return self.low + self.v.clamp(torch.zeros_like(self.span), self.span)
        return self.low + self.span * SOFT[self.soft][0](self.v)

    def forward(self) -> Tensor:
        """(n, g, width), as they are learned."""
        found = self._steps()
        return self.codes.masked_scatter(self.free, through(found, found.round()) if self.soft == "straight" else found)

    def hard(self) -> Tensor:
        """(n, g, width), whole."""
        return self.codes.masked_scatter(self.free, self._steps().round())

    def penalty(self, done: float) -> Tensor | None:
        """For what lies between two codes."""
        if self.soft == "straight" or not self.weigh:
            return None
        found = self._steps()
        off = indecision(found - found.detach().floor(), done)
        return None if off is None else self.weigh * off

    def settle(self) -> None:
        """What is straight stays where it is taught: within reach."""
        if self.soft == "straight":
            with torch.no_grad():
                self.v.clamp_(torch.zeros_like(self.span), self.span)


def noisy(lesson: Practice, held: Packed) -> Callable[[Tensor], Tensor] | None:
    """Inputs with noise of so many of their standard deviations, wherever gradients are taken."""
    if not lesson.noise:
        return None
    draw = torch.Generator().manual_seed(math.prod(held.shape))

    def feed(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        return x + lesson.noise * x.detach().std() * torch.randn(x.shape, generator=draw).to(x)

    return feed


class Even(Soft):
    """Codes and scales of a Grouped. step (n, g): logarithm of a factor of the scale; at.v: of `Positions`. Zeros stay."""

    scale: Tensor
    zero: Tensor

    def __init__(self, held: Grouped, target: Tensor, lesson: Practice) -> None:
        super().__init__()
        self.shape, self.grid, self.feeding = held.shape, held.grid, noisy(lesson, held)
        codes, scale, zero = held.plain()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        weight = target.reshape(held.matrix).float()
        wished = grouped(weight, self.grid) / scale[..., None] + zero[..., None]
        self.at = Positions(
            grouped(codes.float(), self.grid), wished, grouped(weight.abs(), self.grid, -torch.inf), 2**self.grid.bits - 1, lesson
        )
        self.step = nn.Parameter(torch.zeros_like(scale))

    @property
    def feed(self) -> Callable[[Tensor], Tensor] | None:
        return self.feeding

    def _scale(self) -> Tensor:
        return as_stored(self.scale * self.step.exp(), self.grid)

    def dense(self) -> Tensor:
        return ungrouped((self.at() - self.zero[..., None]) * self._scale()[..., None], self.matrix[1]).reshape(self.shape)

    def penalty(self, done: float) -> Tensor | None:
        return self.at.penalty(done)

    def settle(self) -> None:
        self.at.settle()

    def harden(self) -> Grouped:
        with torch.no_grad():
            codes = ungrouped(self.at.hard(), self.matrix[1]).to(torch.uint8)
            return Grouped.of(self.shape, self.grid, codes, self._scale(), self.zero)


class Uneven(Soft):
    """Codes and scales of a Leveled: positions among its levels by rising value, between two of them on a line. step, at.v as in `Even`.
    The table stays."""

    scale: Tensor
    order: Tensor
    rising: Tensor
    whole: Tensor | None
    table: Tensor | None

    def __init__(self, held: Leveled, target: Tensor, lesson: Practice) -> None:
        super().__init__()
        self.shape, self.levels, self.feeding = held.shape, held.levels, noisy(lesson, held)
        codes, scale = held.plain()
        order, rising, bounds = ranked(self.levels, held.table)
        found = {"scale": scale, "whole": held.whole, "table": held.table, "order": order, "rising": rising}
        for name, tensor in found.items():
            self.register_buffer(name, tensor)
        weight = target.reshape(held.matrix).float()
        value = decode(codes, torch.ones_like(scale), self.levels, held.table)
        at = grouped(torch.bucketize(value, bounds).float(), self.levels)
        wish = ratios(weight, scale, self.levels)
        below = (torch.searchsorted(rising, wish, right=True) - 1).clamp(0, len(rising) - 2)
        wished = below + (wish - rising[below]) / (rising[below + 1] - rising[below])
        self.at = Positions(at, wished, grouped(weight.abs(), self.levels, -torch.inf), len(rising) - 1, lesson)
        self.step = nn.Parameter(torch.zeros_like(scale))

    @property
    def feed(self) -> Callable[[Tensor], Tensor] | None:
        return self.feeding

    def _scale(self) -> Tensor:
        wished = self.scale * self.step.exp()
        return through(wished, rounded_scale(wished.detach(), self.levels, self.whole))

    def dense(self) -> Tensor:
        at = self.at()
        below = at.detach().floor().long().clamp(max=len(self.rising) - 2)
        numbers = self.rising[below] + (at - below) * (self.rising[below + 1] - self.rising[below])
        return ungrouped(numbers * self._scale()[..., None], self.matrix[1]).reshape(self.shape)

    def penalty(self, done: float) -> Tensor | None:
        return self.at.penalty(done)

    def settle(self) -> None:
        self.at.settle()

    def harden(self) -> Leveled:
        with torch.no_grad():
            codes = self.order[ungrouped(self.at.hard(), self.matrix[1]).long()]
            return Leveled.of(self.shape, self.levels, codes, self._scale(), self.whole, self.table)


def soften(held: Packed, target: Tensor, lesson: Practice) -> Soft | None:
    """Codes of a grid or of levels, softened so; nothing else can be."""
    if isinstance(held, Grouped):
        return Even(held, target, lesson)
    return Uneven(held, target, lesson) if isinstance(held, Leveled) else None


ERROR = SquaredError()


@dataclass(frozen=True)
class Practice(Lesson):
    """Defaults: AdaRound's soft choice over two codes on each side of a weight, scales that learn, Adam at constant rates, block by block.
    Fewer steps want higher rates and weigh; very few want no soft choice, and rates that fall: of one block of stories260k at 3 bits, 60
    steps on 16 rows come to a KL of 0.033 so (AdaRound 0.048), 200 steps on 64 rows to 0.024 (AdaRound and the default 0.020).
    All blocks, 100 steps on 16 rows: the default 0.289, AdaRound 0.262, so it is not better there."""

    objective: Objective = ERROR
    rates: tuple[tuple[str, float], ...] = (("v", 5e-3), ("step", 3e-4))
    steps: int = 5000
    batch: int = 32
    optimiser: Literal["adam", "signed", "momentum"] = "adam"
    decay: Literal["constant", "linear", "cosine"] = "constant"
    scope: Scope = BLOCK
    soft: Literal["rectified", "sigmoid", "cosine", "straight"] = "rectified"
    reach: int = 2
    weigh: float = 0.01
    share: float = 1.0
    among: Literal["near", "large", "random"] = "near"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise ValueError(f"reach={self.reach}: one code on each side of a weight, or more")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: a share of the weights above 0, at most 1")
        if self.soft not in (*SOFT, "straight"):
            raise ValueError(f"soft={self.soft}: soft choices are {', '.join(SOFT)}, straight")
        if self.among not in ("near", "large", "random"):
            raise ValueError(f"among={self.among}: weights are chosen among the near, the large or random ones")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise}: standard deviations, 0 or more")

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(soften, lesson=self))
