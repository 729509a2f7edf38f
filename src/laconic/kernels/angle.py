"""What a block's output is to meet in length and in direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.transform import Objective


@dataclass(frozen=True)
class SquaredAndAngle(Objective):
    """Mean squared distance of an entry of output from target (..., channels), plus `angle` times -log of the mean cosine between both:
    their lengths, and where they point. Zhao et al. 2025, arXiv:2502.13179, section 3.3. mask (...,): true where it counts."""

    name = "squared error and angle"
    angle: float = 1.0

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        x, y = (each.float() if mask is None else each.float()[mask] for each in (output, target))
        error = (x - y).square().mean()
        if not self.angle:
            return error
        return error - self.angle * torch.cosine_similarity(x, y, -1).mean().clamp(min=1e-6).log()
