"""Claims of BitStack: stacks of signed blocks against SVD without signs, rounding and no scaling, at equal stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, Found, duel, gathered, held, measure, on, run
from laconic.core.claim import Claim, Lab, Paper, Verdict
from laconic.core.packed import Dense, Packed, Product, Scaled, Sum
from laconic.core.site import Linear, Site
from laconic.core.statistic import Norms
from laconic.core.transform import Change, Level, Stats, Transform
from laconic.kernels.grids import Grid
from laconic.kernels.lowrank import low_rank
from laconic.methods.nest.bits.bitstack import BitStack, Stack, factor_of
from laconic.methods.nest.bits.signed import Signed
from laconic.methods.quantize.round.gptq import GPTQ
from laconic.methods.quantize.round.rtn import RTN

# what is decomposed; fewer blocks are its first ones
DEEPEST = Stack(3)


@dataclass(frozen=True)
class Astray(Transform):
    """The stand-in: every row of a block has the signs of the row before it."""

    acts_on = (Linear,)
    level = Stack
    wants = (Norms(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Stack) -> Change:
        (form,) = BitStack()(site, weights, stats, level).hold.values()
        assert isinstance(form, Scaled) and isinstance(form.inner, Sum)
        blocks = [Signed(block.sign.roll(1, 0), block.left, block.right) for block in form.inner.terms if isinstance(block, Signed)]
        return Change(hold={site.tensors["weight"]: Scaled(Sum(*blocks), form.scale)})

    def stored(self, site: Site, level: Stack) -> int:
        return BitStack().stored(site, level)


@dataclass(frozen=True)
class Even(Transform):
    """BitStack without activation scaling."""

    acts_on = (Linear,)
    level = Stack

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Stack) -> Change:
        return BitStack()(site, weights, {Norms(): torch.ones(site.matrix[1])}, level)

    def stored(self, site: Site, level: Stack) -> int:
        return BitStack().stored(site, level)


@dataclass(frozen=True)
class Misled(Transform):
    """The stand-in for scaling: the norms of shuffled channels."""

    acts_on = (Linear,)
    level = Stack
    wants = (Norms(),)

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Stack) -> Change:
        order = torch.randperm(site.matrix[1], generator=torch.Generator().manual_seed(0))
        return BitStack()(site, weights, {Norms(): stats[Norms()][order]}, level)

    def stored(self, site: Site, level: Stack) -> int:
        return BitStack().stored(site, level)


@dataclass(frozen=True)
class Unsigned(Transform):
    """The baseline: SVD of the same scaled matrix, no signs, as many singular vectors in fp16 as the bytes of the stack hold."""

    acts_on = (Linear,)
    level = Stack
    wants = (Norms(),)

    def rank(self, site: Site, level: Stack) -> int:
        """Singular vectors that the bytes of the blocks hold."""
        n, m = site.matrix
        return max(1, min(n, m, level.blocks * Signed.bytes_of(n, m, level.rank_of(n, m)) // (2 * (n + m))))

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Stack) -> Change:
        weight = weights["weight"].reshape(site.matrix).float()
        factor = factor_of(weight, stats[Norms()])
        left, right = low_rank(weight / factor.float(), self.rank(site, level))
        product = Product(Dense(left.T.contiguous().half()), Dense(right.contiguous().half()))
        return Change(hold={site.tensors["weight"]: Scaled(product, factor)})

    def stored(self, site: Site, level: Stack) -> int:
        return 2 * sum(site.matrix) * self.rank(site, level) + 2 * site.matrix[1]


def cut(bench: Bench, forms: Callable[[], Mapping[str, Packed]], key: object, count: int) -> Found:
    """The first `count` parts of each form, measured."""
    found: Found = bench.once(("cut", key, count), lambda: measure(bench, {name: form.first(count) for name, form in forms().items()}))
    return found


def stacked(bench: Bench, transform: Transform, count: int, seed: int) -> Found:
    """The first blocks of a stack, measured."""
    seed = seed if transform.wants else 0
    return cut(bench, lambda: held(bench, transform, DEEPEST, seed), (transform, seed), count)


def rounded(bench: Bench, quantizer: Transform, bits: int, count: int, seed: int) -> Found:
    """A quantizer in the finest groups that need no more bytes than so many blocks, matrix by matrix."""

    def choose(site: Site) -> tuple[Transform, Level] | None:
        if bench.linears(quantizer, None)(site) is None:
            return None
        limit = BitStack().stored(site, Stack(count))
        sizes = range(4, site.matrix[1] + 1)
        return quantizer, Grid(bits, next((g for g in sizes if quantizer.stored(site, Grid(bits, g)) <= limit), None))

    seed = seed if quantizer.wants else 0
    found: Found = bench.once(("rounded", quantizer, bits, count, seed), partial(run, bench, choose, seed))
    return found


Rival = Callable[[Bench, int, int], Found]


def _against(name: str, rival: Rival, counts: Sequence[int], lab: Lab, ours: Transform, seeds: Sequence[int]) -> Verdict:
    @gathered
    def check(bench: Bench) -> Iterator[Duel]:
        for count in counts:
            label = f"{count} block" + ("s" if count > 1 else "")
            pairs = [(stacked(bench, ours, count, seed), rival(bench, count, seed)) for seed in lab.draws(seeds)]
            yield duel(label, [pair[0] for pair in pairs], [pair[1] for pair in pairs], names=("BitStack", name))

    return on(lab, "nano", check)


def _unsigned(bench: Bench, count: int, seed: int) -> Found:
    found: Found = bench.once(("unsigned", count, seed), lambda: run(bench, bench.linears(Unsigned(), Stack(count)), seed))
    return found


def _nearest(bench: Bench, count: int, seed: int) -> Found:
    return rounded(bench, RTN(), count, count, seed)


def _gptq(bench: Bench, count: int, seed: int) -> Found:
    return rounded(bench, GPTQ(), count, count, seed)


def _even(bench: Bench, count: int, seed: int) -> Found:
    return stacked(bench, Even(), count, seed)


PAPER = Paper("Wang et al.", 2024, "arXiv:2410.23918", "section 4")
SCALE = "nano, all matrices of the blocks, ranks 1 to 3 (factors a quarter of the signs' bytes at most), 3 draws of the calibration rows"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="At the bytes of one, two and three blocks, a stack loses less KL and perplexity than SVD of the same scaled matrices.",
        where=PAPER,
        scale=SCALE,
        check=partial(_against, "SVD without signs", _unsigned, (1, 2, 3), ours=BitStack(), seeds=SEEDS),
        broken=partial(_against, "SVD without signs", _unsigned, (1, 2, 3), ours=Astray(), seeds=ONE),
    ),
    Claim(
        says="At one and two blocks (1.2 and 2.4 bits a weight), a stack has a lower KL and perplexity than round to nearest.",
        where=PAPER,
        scale=SCALE + "; 1 and 2 bits in the finest groups that need no more bytes",
        check=partial(_against, "round to nearest", _nearest, (1, 2), ours=BitStack(), seeds=SEEDS),
        broken=partial(_against, "round to nearest", _nearest, (1, 2), ours=Astray(), seeds=ONE),
    ),
    Claim(
        says="At three blocks (3.6 bits a weight), a stack has a lower KL and perplexity than round to nearest.",
        where=PAPER,
        scale=SCALE + "; 3 bits in the finest groups that need no more bytes",
        check=partial(_against, "round to nearest", _nearest, (3,), ours=BitStack(), seeds=SEEDS),
        broken=partial(_against, "round to nearest", _nearest, (3,), ours=Astray(), seeds=ONE),
    ),
    Claim(
        says="At two blocks (2.4 bits a weight), a stack loses less KL and perplexity than GPTQ.",
        where=PAPER,
        scale=SCALE + "; 2 bits in the finest groups that need no more bytes",
        check=partial(_against, "GPTQ", _gptq, (2,), ours=BitStack(), seeds=SEEDS),
        broken=partial(_against, "GPTQ", _gptq, (2,), ours=Astray(), seeds=ONE),
    ),
    Claim(
        says="Scaling by the norms of the activations lowers a stack's KL and perplexity at two and at three blocks.",
        where=Paper("Wang et al.", 2024, "arXiv:2410.23918", "section 3.1"),
        scale=SCALE,
        check=partial(_against, "no scaling", _even, (2, 3), ours=BitStack(), seeds=SEEDS),
        broken=partial(_against, "no scaling", _even, (2, 3), ours=Misled(), seeds=ONE),
    ),
)
