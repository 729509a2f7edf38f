"""Claims of Fast Sparse ConvNets: products of sparse 1 x 1 convolutions are exact and quick, and weights that go gradually cost less."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, held, judged, measure, on, spread, tuned, turns
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.kernels.bits import pack
from laconic.kernels.native import native
from laconic.kernels.sparse import sparse_pixels
from laconic.kernels.threads import threads
from laconic.methods.prune.cut.drop import Drop, Sparsity
from laconic.methods.prune.schedule.gradual import Gradual
from laconic.methods.prune.score.magnitude import Magnitude

# side of a map, channels in and out
MAPS = ((56, 128), (28, 256), (14, 512))
ZEROS = (0.6, 0.7, 0.8, 0.9, 0.95)
# zeros where it has to be ahead, and how many times as quick as compressed rows
MOSTLY, OF_ROWS = 0.9, 3.0
KEEP = (0.2, 0.1)

Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def drawn(channels: int, zeros: float, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (1, c, side, side), packed mask, kept weights in bf16, and the dense matrix (c, c)."""
    draw = torch.Generator().manual_seed(channels)
    mask = torch.rand(channels, channels, generator=draw) >= zeros
    kept = torch.randn(int(mask.sum()), generator=draw).bfloat16()
    weight = torch.zeros(channels, channels).masked_scatter(mask, kept.float())
    return torch.randn(1, channels, side, side, generator=draw), pack(mask.to(torch.uint8), 1), kept, weight


def by_strips(x: Tensor, mask: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """The kernel."""
    return sparse_pixels(x, mask, kept)


def astray(x: Tensor, mask: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """A stand-in: each weight is its neighbour's."""
    return sparse_pixels(x, mask, kept.roll(1))


def by_dense(x: Tensor, mask: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """A stand-in: zeros and all."""
    return F.conv2d(x, weight[..., None, None])


def _exact(product: Product, lab: Lab) -> Verdict:
    worst = 0.0
    for side, channels in MAPS:
        for zeros in ZEROS:
            made = drawn(channels, zeros, side)
            right = torch.einsum("nm,bmhw->bnhw", made[3].double(), made[0].double())
            worst = max(worst, float((product(*made) - right).norm() / right.norm()))
    numbers = {"greatest difference, as a share of the norm": Measurement(worst, "", len(MAPS) * len(ZEROS))}
    return judged([] if worst < 1e-5 else [f"results differ by {worst:.2g}"], numbers)


def _faster(product: Product, rival: str, factor: float, lab: Lab) -> Verdict:
    """One image on one thread, in turns with torch's dense convolution or its product of compressed rows."""
    if native() is None:
        return Verdict("cannot be checked here", {}, "the native kernels were not built here")
    numbers: dict[str, Measurement] = {}
    wrong: list[str] = []
    with threads(1):
        for side, channels in MAPS:
            ahead = []
            for zeros in ZEROS:
                x, mask, kept, weight = drawn(channels, zeros, side)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    rows = weight.to_sparse_csr()
                theirs: dict[str, Callable[[], object]] = {
                    "dense convolution": partial(F.conv2d, x, weight[..., None, None]),
                    "compressed rows": partial(torch.mm, rows, x[0].reshape(channels, -1)),
                }
                took = turns((partial(product, x, mask, kept, weight), theirs[rival]), 5 if lab.quick else 21)
                ratios = [b / a for a, b in zip(*took, strict=True)]
                numbers[f"{side} x {side}, {zeros:.0%} zeros: times as fast as {rival}"] = spread(ratios, "")
                ahead += [zeros] * (statistics.median(ratios) > 1)
                if zeros == MOSTLY and statistics.median(ratios) <= factor:
                    wrong.append(f"at {side} x {side} and {zeros:.0%} zeros it is {statistics.median(ratios):.2f} times as fast")
            if ahead:
                numbers[f"{side} x {side}: ahead of {rival} from so many zeros"] = Measurement(min(ahead), "", 1)
    return judged(wrong, numbers)


def _tuned(bench: Bench, lesson: Gradual, keep: float, seed: int, stray: bool) -> Found:
    def make() -> Found:
        forms = held(bench, Drop(Magnitude()), Sparsity(keep))
        return measure(bench, tuned(bench, forms, lesson, seed, astray=stray))

    found: Found = bench.once(("gradual", lesson, keep, seed, stray), make)
    return found


@gathered
def _duels(bench: Bench, steps: int, broken: bool, seeds: Sequence[int]) -> Iterator[Duel]:
    lesson = Gradual(steps=steps, batch=64)
    for keep in KEEP:
        ours = [_tuned(bench, lesson, keep, seed, broken) for seed in seeds]
        # all at once at the first step, and as many steps of the same lesson
        theirs = [_tuned(bench, replace(lesson, until=1e-6), keep, seed, False) for seed in seeds]
        yield duel(f"{keep:.0%} kept", ours, theirs, names=("gradually", "at once, then tuned"))


def _gradually(broken: bool, lab: Lab) -> Verdict:
    return on(lab, "resnet20", lambda bench: _duels(bench, 60 if lab.quick else 400, broken, ONE if broken else lab.draws(SEEDS)))


PAPER = Paper("Elsen et al.", 2020, "arXiv:1911.09723", "sections 3.1 and 4")
SHAPES = "one image, one thread, 56 x 56 of 128 channels, 28 x 28 of 256, 14 x 14 of 512, 60 to 95 % zeros, weights in bf16"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="The sparse product is the dense convolution.",
        where=PAPER,
        scale=SHAPES,
        check=partial(_exact, by_strips),
        broken=partial(_exact, astray),
    ),
    Claim(
        says="At 90 % zeros it is ahead of dense convolution.",
        where=PAPER,
        scale=f"{SHAPES}; torch's own convolution in fp32",
        check=partial(_faster, by_strips, "dense convolution", 1.0),
        broken=partial(_faster, by_dense, "dense convolution", 1.0),
        timed=True,
    ),
    Claim(
        says="At 90 % zeros it is several times as quick as a product of compressed rows.",
        where=PAPER,
        scale=f"{SHAPES}; torch's own product of compressed rows in fp32, at least {OF_ROWS:g} times",
        check=partial(_faster, by_strips, "compressed rows", OF_ROWS),
        broken=partial(_faster, by_dense, "compressed rows", OF_ROWS),
        timed=True,
    ),
    Claim(
        says="Weights that go gradually cost less than as many that go at once, with the same tuning after that.",
        where=PAPER,
        scale="ResNet-20 on CIFAR-10, all convolutions, 20 and 10 % kept, 60 steps (in full 400) of 64 images, 3 draws of 256 (1,024)",
        check=partial(_gradually, False),
        broken=partial(_gradually, True),
    ),
)
