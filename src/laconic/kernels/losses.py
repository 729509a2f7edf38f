"""What lessons make small, on the outputs of a compressed model and those of the original."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laconic.core.transform import Objective


@dataclass(frozen=True)
class SquaredError(Objective):
    """Squared distance of output and target (..., channels): summed over channels, a mean over everything before them; mask (...,): true
    where it counts."""

    name = "squared error"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        each = (output.float() - target.float()).square().sum(-1)
        return each.mean() if mask is None else each[mask].mean()


@dataclass(frozen=True)
class Divergence(Objective):
    """KL(target || output) in nats a prediction, both logits (..., classes); mask (...,): true where a prediction counts. Hinton et al.
    2015, arXiv:1503.02531, section 2, at temperature 1."""

    name = "KL"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        wanted = target.float().log_softmax(-1)
        each = (wanted.exp() * (wanted - output.float().log_softmax(-1))).sum(-1)
        return each.mean() if mask is None else each[mask].mean()
