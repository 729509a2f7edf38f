"""FlexRound: rounding that is learned by dividing each weight by a factor of its own, so that it may move further than to a neighbour.

Lee et al. 2023, arXiv:2306.00317, section 3, eq. 2:  What = s1 round(W / S),  S = s1 * S2 * s3, of a convolution also * s4, clipped to the
bits.  weight (n, m) in groups: s1 (n, g) the grid size, S2 (n, m) a factor of each weight, s3 (n,) of each output channel, s4 of each input
channel.  All are learned with the weights frozen; round passes gradients as they are, so that dL/dS2 is -W / S2^2 times the gradient of the
rounded weight: large weights move most.  The objective is the squared error of a block's (or a layer's) output to the original's, on inputs
that the compressed model before it gives.  Afterwards codes and s1 are stored, in the bytes of rounding to nearest, which is what it begins
with, on the scales and zeros that are held, whoever chose them.
Positive by learning logarithms, as in Lee et al. 2024 (LRQ), arXiv:2407.11534, section 2.2; the gradient stays proportional to W / S2.
Memory: four fp32 numbers for each weight of the blocks that learn at once.
Sibling: quantize.round.adaround (adds to the weight: up or down, no further, at a fixed grid size)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.claim import Card, Paper
from laconic.core.packed import Packed, Soft
from laconic.core.transform import BLOCK, Lesson, Objective, Scope
from laconic.kernels.grids import as_stored, grouped, parted, through, ungrouped
from laconic.kernels.losses import SquaredError
from laconic.methods.quantize.grid.grouped import Grouped

CARD = Card(Paper("Lee et al.", 2023, "arXiv:2306.00317", "section 3, eq. 2-4"), catalogue="flexround", sibling="quantize.round.adaround")


def divided(runs: Tensor, s1: Tensor, factor: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of weights in groups, (n, g, width); s1, zero (n, g, 1); factor: the logarithm of S2 * s3 * s4, as wide as it comes."""
    whole, over = parted(zero)
    wished = runs / (s1 * factor.exp()) + over
    return (through(wished, wished.round()) + whole).clamp(0, 2**bits - 1)


class Divided(Soft):
    """Codes and scales on a grid that are learned by division. s1 (n, g), s2 (n, g, width), s3 (n, 1, 1), s4 (channels in,): logarithms of
    factors, zero at first; s4 of a convolution alone."""

    scale: Tensor
    zero: Tensor
    runs: Tensor

    def __init__(self, held: Grouped, target: Tensor) -> None:
        super().__init__()
        self.shape, self.grid = held.shape, held.grid
        _, scale, zero = held.plain()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("runs", grouped(target.reshape(held.matrix).float(), self.grid))
        self.s1 = nn.Parameter(torch.zeros_like(scale))
        self.s2 = nn.Parameter(torch.zeros_like(self.runs))
        self.s3 = nn.Parameter(torch.zeros(held.matrix[0], 1, 1))
        if len(held.shape) > 2:
            self.s4 = nn.Parameter(torch.zeros(held.shape[1]))

    def _factor(self) -> Tensor:
        if len(self.shape) <= 2:
            return self.s2 + self.s3
        # one for each input channel, which has an entry for each place of the kernel
        columns = self.s4.repeat_interleave(self.matrix[1] // self.shape[1])
        return self.s2 + self.s3 + grouped(columns[None], self.grid)

    def _both(self) -> tuple[Tensor, Tensor]:
        """Codes (n, g, width) and scale (n, g)."""
        scale = as_stored(self.scale * self.s1.exp(), self.grid)
        return divided(self.runs, scale[..., None], self._factor(), self.zero[..., None], self.grid.bits), scale

    def dense(self) -> Tensor:
        codes, scale = self._both()
        return ungrouped((codes - self.zero[..., None]) * scale[..., None], self.matrix[1]).reshape(self.shape)

    def harden(self) -> Grouped:
        with torch.no_grad():
            codes, scale = self._both()
            return Grouped.of(self.shape, self.grid, ungrouped(codes, self.matrix[1]).to(torch.uint8), scale, self.zero)


def soften(held: Packed, target: Tensor) -> Soft | None:
    """Codes on a grid, softened so; nothing else can be."""
    return Divided(held, target) if isinstance(held, Grouped) else None


ERROR = SquaredError()
RATE = 1e-3


@dataclass(frozen=True)
class FlexRound(Lesson):
    """Defaults: 5,000 steps of 32 samples by Adam at one rate of 0.001 for all factors, block by block. The authors' published run of
    Llama 2 has these steps and this rate, at one sequence a step; other models have rates of their own. Fewer steps want a higher rate."""

    objective: Objective = ERROR
    rates: tuple[tuple[str, float], ...] = (("s1", RATE), ("s2", RATE), ("s3", RATE), ("s4", RATE))
    steps: int = 5000
    batch: int = 32
    decay: Literal["constant", "linear", "cosine"] = "constant"
    scope: Scope = BLOCK

    def soften(self, held: Packed, target: Tensor) -> Soft | None:
        return held.soften(target, soften)
