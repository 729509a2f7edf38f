"""Claims of truncated SVD: what is left is the tail of the spectrum, and no other product of that rank leaves less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from laconic.claims.lab import ONE, SEEDS, Bench, Duel, duel, gathered, judged, on, seen, spread
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.site import Linear, Site
from laconic.core.transform import Change, Stats, Transform
from laconic.methods.factorize.lowrank.svd import SVD, Kept, product

SHARES = (0.9, 0.6, 0.3)
# factors are stored in bf16, and so is what they come to
ROUNDED = 0.02


@dataclass(frozen=True)
class Sketched(Transform):
    """The best product whose right factor spans directions drawn at random: W Q Q^T."""

    seed: int = 0
    acts_on = (Linear,)
    level = Kept

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Kept) -> Change:
        weight = weights["weight"].float()
        draw = torch.Generator().manual_seed(self.seed)
        basis = torch.linalg.qr(torch.randn(weight.shape[1], level.rank(*site.matrix), generator=draw))[0]
        return Change(hold={site.tensors["weight"]: product(weight @ basis, basis.T)})

    def stored(self, site: Site, level: Kept) -> int:
        return SVD().stored(site, level)


@dataclass(frozen=True)
class Least(Transform):
    """The stand-in: the directions that matter least are kept."""

    acts_on = (Linear,)
    level = Kept

    def __call__(self, site: Site, weights: Mapping[str, Tensor], stats: Stats, level: Kept) -> Change:
        u, s, v = torch.linalg.svd(weights["weight"].float(), full_matrices=False)
        rank = level.rank(*site.matrix)
        return Change(hold={site.tensors["weight"]: product(u[:, -rank:] * s[-rank:], v[-rank:])})

    def stored(self, site: Site, level: Kept) -> int:
        return SVD().stored(site, level)


def _tail(bench: Bench, method: Transform) -> Verdict:
    numbers: dict[str, Measurement] = {}
    wrong: list[str] = []
    for share in SHARES:
        off, least = [], []
        for site in bench.source.anatomy.sites(Linear):
            if bench.linears(method, Kept(share))(site) is None:
                continue
            weight = bench.source.read(site.tensors["weight"].name).float()
            (form,) = method(site, {"weight": weight}, {}, Kept(share)).hold.values()
            left, tail = (
                float((form.dense() - weight).double().square().sum()),
                float(torch.linalg.svdvals(weight.double())[Kept(share).rank(*site.matrix) :].square().sum()),
            )
            off.append(left / tail - 1)
            least.append(tail / float(weight.double().square().sum()))
        numbers[f"{share:.0%} of the numbers: error over the tail of the spectrum, less 1"] = spread(off, "")
        numbers[f"{share:.0%} of the numbers: the tail, as a share of the matrix"] = spread(least, "")
        if max(map(abs, off)) > ROUNDED:
            wrong.append(f"at {share:.0%} the error is not the tail of the spectrum")
    return judged(wrong, numbers)


@gathered
def _better(bench: Bench, method: Transform, seeds: Sequence[int]) -> Iterator[Duel]:
    for share in SHARES[:2]:
        ours, theirs = ([seen(bench, one, Kept(share)) for one in side] for side in ([method], [Sketched(seed) for seed in seeds]))
        yield duel(f"{share:.0%} of the numbers", ours, theirs, names=("truncated SVD", "random directions"))


def _on_nano(check: Callable[..., Verdict], lab: Lab, **words: object) -> Verdict:
    return on(lab, "nano", partial(check, **words))


PAPER = Paper("Eckart & Young", 1936, "10.1007/BF02288367")
CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="The squared error of a matrix is the sum of the squared singular values that are gone, to the rounding of stored factors.",
        where=PAPER,
        scale="nano, all matrices of the blocks, 90, 60 and 30 % of the numbers; the stand-in keeps the least directions",
        check=partial(_on_nano, _tail, method=SVD()),
        broken=partial(_on_nano, _tail, method=Least()),
    ),
    Claim(
        says="At equal bytes KL and perplexity are below those of the best products over random directions.",
        where=PAPER,
        scale=f"nano, all matrices of the blocks, 90 and 60 % of the numbers, {len(SEEDS)} draws of directions",
        check=partial(_on_nano, _better, method=SVD(), seeds=SEEDS),
        broken=partial(_on_nano, _better, method=Least(), seeds=ONE),
    ),
)
