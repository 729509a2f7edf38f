"""CBQ: rounding learned over windows of neighbouring blocks, each weight's choice shifted by a product of two thin matrices.

Ding et al. 2023, arXiv:2312.07950, section 3:  W~ = s (clip(floor(W / s) + h(V) + z, 0, 2^b - 1) - z),  h the rectified sigmoid of
AdaRound, V = V_0 + A_1 A_2 (LoRA-Rounding).  weight (n, m) in groups, A_1 (n, r), A_2 (r, m), s (n, g) learned too, its gradient that of a
learned step (Esser et al. 2020, arXiv:1902.08153).  Windows of 2 blocks overlap by one; the objective is the squared error of a window's
output plus its KL as logits, to what the original gives on its own hidden states and on those that the compressed model before it gives.
V_0, where the soft weight is the float weight, stays and is no number to learn. As the paper writes it, V is the product alone, half for
all weights at first: then five numbers choose for a row, wherever its weights stand (stories260k in 2 bits, 100 steps: KL 3.15 at best,
3.42 by rounding to nearest, 1.20 with V_0). Nor can a product drive every choice to an end as the penalty of AdaRound (`weigh`) asks; what
it tries costs more than it brings (1.91 at 0.001). So V is multiplied by a factor that rises to `sharp` after the first fifth of the steps.
To learn: r (n + m) numbers in place of n m, and the steps.
Sibling: quantize.round.adaround (a number for each weight, block by block, step sizes stay)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import Lesson, Objective, Scope, Window
from laconic.kernels.grids import as_stored, grouped, parted, through, ungrouped
from laconic.kernels.losses import SquaredAndDivergence
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.adaround import WARM, begun, indecision, rectified

CARD = Card(
    Paper("Ding et al.", 2023, "arXiv:2312.07950", "section 3"),
    catalogue="cbq",
    sibling="quantize.round.adaround",
    exceptions={
        "a soft form computes what it stores": "h(V) lies between 0 and 1 until the factor of V has driven it to an end",
        "every parameter learns at once": "A_2 moves nothing while A_1 is zero, as in LoRA",
    },
)


class Shifted(Soft):
    """Codes on a grid whose step is learned, each below or above its weight. step (n, g): logarithm of a factor of the scale; a1 (n, r),
    a2 (r, m), or v (n, m) where r is None: what is added to V_0."""

    scale: Tensor
    zero: Tensor
    whole: Tensor
    over: Tensor
    runs: Tensor
    done: Tensor

    def __init__(self, held: Grouped, target: Tensor, rank: int | None, sharp: float, weigh: float) -> None:
        super().__init__()
        self.shape, self.grid, self.rank, self.sharp, self.weigh = held.shape, held.grid, rank, sharp, weigh
        _, scale, zero = held.plain()
        whole, over = parted(zero)
        runs = grouped(target.reshape(held.matrix).float(), self.grid)
        for name, tensor in (("scale", scale), ("zero", zero), ("whole", whole), ("over", over), ("runs", runs)):
            self.register_buffer(name, tensor)
        # of the steps, which a form that goes on in the next window remembers
        self.register_buffer("done", torch.zeros(()))
        self.step = nn.Parameter(torch.zeros_like(scale))
        n, m = held.matrix
        if rank is None:
            self.v = nn.Parameter(torch.zeros(n, m))
        else:
            draw, rank, bound = torch.Generator().manual_seed(n * 65537 + m), min(rank, n, m), 1 / math.sqrt(max(m, 1))
            self.a1 = nn.Parameter(torch.zeros(n, rank))
            self.a2 = nn.Parameter(torch.empty(rank, m).uniform_(-bound, bound, generator=draw))

    def _choices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale (n, g, 1), the whole numbers below (n, g, width), V (n, g, width)."""
        scale = as_stored(self.scale * self.step.exp(), self.grid)[..., None]
        wished = self.runs / scale + self.over[..., None]
        below = wished.detach().floor()
        shift = self.v if self.rank is None else self.a1 @ self.a2
        return scale, through(wished, below), begun(wished.detach(), below) + grouped(shift, self.grid)

    def _weights(self, scale: Tensor, codes: Tensor) -> Tensor:
        return ungrouped((codes - self.zero[..., None]) * scale, self.matrix[1]).reshape(self.shape)

    def _codes(self, below: Tensor, choice: Tensor) -> Tensor:
        return (below + choice + self.whole[..., None]).clamp(0, 2**self.grid.bits - 1)

    def dense(self) -> Tensor:
        scale, below, v = self._choices()
        factor = self.sharp ** ((float(self.done) - WARM) / (1 - WARM)) if float(self.done) > WARM else 1.0
        return self._weights(scale, self._codes(below, rectified(factor * v)))

    def penalty(self, done: float) -> Tensor | None:
        self.done.fill_(done)
        if not self.weigh:
            return None
        found = indecision(ungrouped(rectified(self._choices()[2]), self.matrix[1]), done)
        return None if found is None else self.weigh * found

    def harden(self) -> Grouped:
        with torch.no_grad():
            scale, below, v = self._choices()
            codes = ungrouped(self._codes(below, (v >= 0).float()).round(), self.matrix[1]).to(torch.uint8)
            return Grouped.of(self.shape, self.grid, codes, scale[..., 0], self.zero)


def soften(held: Packed, target: Tensor, rank: int | None, sharp: float, weigh: float) -> Soft | None:
    """Codes on a grid, softened so; nothing else can be."""
    return Shifted(held, target, rank, sharp, weigh) if isinstance(held, Grouped) else None


APART = SquaredAndDivergence()
PAIRS = Window(blocks=2, overlap=1)


@dataclass(frozen=True)
class CBQ(Lesson):
    """Defaults: 3 passes over 128 calibration sequences, one a step, windows of 2 blocks that overlap by one, rank 5, as in the paper; the
    rates are ours, and fall along a cosine. Fewer steps want higher ones. rank None: a number for each weight, v. ends: of inputs that are
    rounded with the weights and hold a step (`quantize.round.inputs`, step: true)."""

    objective: Objective = APART
    rates: tuple[tuple[str, float], ...] = (("step", 1e-3), ("a1", 5e-2), ("a2", 5e-2), ("v", 2e-2), ("ends", 1e-2))
    steps: int = 3 * 128
    batch: int = 1
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    scope: Scope = PAIRS
    targets: Literal["float", "prefix", "both"] = "both"
    rank: int | None = 5
    sharp: float = 60.0
    weigh: float = 0.0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: a product has a rank of 1 or more; none at all (null) is a number for each weight")
        if self.sharp < 1:
            raise ValueError(f"sharp={self.sharp}: choices become harder by a factor of 1 or more")

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, partial(soften, rank=self.rank, sharp=self.sharp, weigh=self.weigh))
