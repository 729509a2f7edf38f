"""What lessons make small, on the outputs of a compressed model and those of the original."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from laconic.core.errors import UserError
from laconic.core.transform import Objective
from laconic.kernels.densities import means


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
        each: Tensor = _Apart.apply(output, target)  # type: ignore[no-untyped-call]
        return each.mean() if mask is None else each[mask].mean()


class _Apart(torch.autograd.Function):
    """KL(target || output) of each prediction. The gradient is softmax(output) - softmax(target), made on the way, some predictions at a
    time, so that what is made stays in a processor's cache; none flows to the target."""

    SOME = 2**18

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        wide = output.shape[-1]
        given, wanted = output.reshape(-1, wide), target.reshape(-1, wide)
        each = given.new_empty(len(given), dtype=torch.float32)
        slope = torch.empty_like(given) if ctx.needs_input_grad[0] else None
        some = max(1, _Apart.SOME // wide)
        for at in range(0, len(given), some):
            rows = slice(at, at + some)
            found, wish = given[rows].float().log_softmax(-1), wanted[rows].float().log_softmax(-1)
            share = wish.exp()
            torch.sum(wish.sub_(found).mul_(share), -1, out=each[rows])
            if slope is not None:
                slope[rows] = found.exp_().sub_(share)
        ctx.save_for_backward(*([] if slope is None else [slope.reshape(output.shape)]))
        return each.reshape(output.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rate: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * rate[..., None].to(slope.dtype), None


@dataclass(frozen=True)
class SquaredAndDivergence(Objective):
    """`SquaredError`, plus `weigh` times the KL(target || output) of both as logits over their channels. Ding et al. 2023,
    arXiv:2312.07950, section 3."""

    name: ClassVar[str] = "squared error and KL"
    weigh: float = 1.0

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        error = SquaredError()(output, target, mask)
        return error if not self.weigh else error + self.weigh * Divergence()(output, target, mask)


@dataclass(frozen=True)
class Neighbours(Objective):
    """KL between what two sets of vectors say of who is near whom, in nats a vector: output (b, m), target (b, d), row i of both the same
    thing; softmax over all others of cosine / temperature."""

    name: ClassVar[str] = "KL of neighbourhoods"
    temperature: float = 0.05

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        kept = [vectors if mask is None else vectors[mask] for vectors in (output, target)]
        others = ~torch.eye(len(kept[0]), dtype=torch.bool, device=output.device)
        logits = []
        for vectors in kept:
            near = nn.functional.normalize(vectors.float(), dim=-1)
            logits.append((near @ near.T / self.temperature)[others].reshape(len(near), -1))
        return Divergence()(logits[0], logits[1], None)


@dataclass(frozen=True)
class JensenShannon(Objective):
    """KL(target || mean) / 2 + KL(output || mean) / 2 in nats a prediction, `mean` half of each distribution: symmetric, at most log 2.
    Both logits (..., classes)."""

    name = "Jensen-Shannon divergence"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        p, q = target.float().log_softmax(-1), output.float().log_softmax(-1)
        middle = torch.logaddexp(p, q) - math.log(2)
        each = 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))
        return each.mean() if mask is None else each[mask].mean()


@dataclass(frozen=True)
class Angular(Objective):
    """The angle between the logits of both, as a share of a half turn: arccos(cos(output, target)) / pi, 0 to 1."""

    name = "angle"
    unit: ClassVar[str] = "half turns"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        each = torch.cosine_similarity(output.double(), target.double(), -1).clamp(-1, 1).arccos() / math.pi
        return each.mean() if mask is None else each[mask].mean()


@dataclass(frozen=True)
class Euclidean(Objective):
    """The distance between the logits of both, the root of the summed squares of a prediction."""

    name = "distance"
    unit: ClassVar[str] = "logits"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        each = (output.float() - target.float()).norm(dim=-1)
        return each.mean() if mask is None else each[mask].mean()


@dataclass(frozen=True)
class NoiseToSignal(Objective):
    """Energy of the difference of two answers over that of the wished one, in decibels, a mean over samples: the signal to quantization
    noise ratio turned about. Both are log-densities (b, ..., bins) of numbers (`kernels.densities`)."""

    name = "noise to signal"
    unit: ClassVar[str] = "dB"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        given, wanted = (means(logits if mask is None else logits[mask]).flatten(1) for logits in (output, target))
        energies = [values.float().square().sum(1).clamp(min=torch.finfo(torch.float32).tiny) for values in (given - wanted, wanted)]
        return 10 * (energies[0] / energies[1]).log10().mean()


@dataclass(frozen=True)
class Dissimilarity(Objective):
    """1 - SSIM, a mean over square images of one channel, entries from -1 to 1: Wang et al. 2004, 10.1109/TIP.2003.819861, sections III-B
    and III-C, with its Gaussian window of 11 x 11 and its constants. What a window has beyond the edge is mirrored. Both are
    log-densities (b, side^2, bins) of entries (`kernels.densities`)."""

    name = "structural dissimilarity"
    unit: ClassVar[str] = "1 - SSIM"

    def __call__(self, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        side = math.isqrt(output.shape[1]) if output.dim() == 3 else 0
        if side * side != output.shape[1] or side < 6:
            raise UserError(
                f"structural similarity is of square images, not of answers {tuple(output.shape)}; use search.allocate.knapsack"
            )
        x, y = (means(logits if mask is None else logits[mask]).float().reshape(-1, 1, side, side) for logits in (output, target))
        line = torch.exp(-(torch.arange(-5.0, 6.0, device=x.device) / 1.5).square() / 2)
        window = (line[:, None] * line / line.sum().square())[None, None]

        def local(values: Tensor) -> Tensor:
            return nn.functional.conv2d(nn.functional.pad(values, (5,) * 4, mode="reflect"), window)

        steady, little = (0.01 * 2) ** 2, (0.03 * 2) ** 2
        a, b = local(x), local(y)
        spread_a, spread_b, common = local(x * x) - a * a, local(y * y) - b * b, local(x * y) - a * b
        same = (2 * a * b + steady) * (2 * common + little) / ((a * a + b * b + steady) * (spread_a + spread_b + little))
        return 1 - same.mean()
