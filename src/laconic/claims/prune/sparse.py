"""Claims of Flash-LLM: products of a sparse matrix equal those of the dense one, fewer bytes are read, and that makes them faster."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.claims.lab import judged, turns
from laconic.core.claim import Claim, Lab, Measurement, Paper, Verdict
from laconic.core.packed import Dense
from laconic.kernels.native import native
from laconic.methods.prune.cut.sparse import Sparse

ZEROS = (0.6, 0.7, 0.8)
# a matrix of a model of 1.1 billion weights
SHAPE = (5632, 2048)
# rounding of sums in fp32, as a share of what is added
NEAR = 1e-6

Product = Callable[[Sparse, Tensor], Tensor]


def drawn(n: int, m: int, zeros: float, seed: int = 0) -> tuple[Tensor, Sparse]:
    """A random matrix in bf16 with zeros anywhere: dense, and as it is held."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, m, generator=draw) >= zeros
    weight = (torch.randn(n, m, generator=draw) * mask).bfloat16()
    return weight, Sparse.of((n, m), mask, Dense(Sparse.gather(weight, mask)))


def as_held(form: Sparse, x: Tensor) -> Tensor:
    """The product as it is: with what is stored."""
    return form.matmul(x)


def through_dense(form: Sparse, x: Tensor) -> Tensor:
    """A stand-in: unpack all of it, then multiply."""
    return F.linear(x, form.dense().to(x.dtype))


def astray(form: Sparse, x: Tensor) -> Tensor:
    """A stand-in: the weights of a row in the order of the row after it."""
    line = form.values.line()
    return Sparse(form.shape, form.mask, Dense(line.reshape(-1).roll(1))).matmul(x)


def _exact(lab: Lab, product: Product) -> Verdict:
    worst, count, draw = 0.0, 0, torch.Generator().manual_seed(0)
    for n, m in ((64, 64), (33, 130), (300, 1000)):
        for zeros in (0.0, *ZEROS, 0.99):
            weight, form = drawn(n, m, zeros)
            for rows in (1, 2, 7, 32, 100):
                x = torch.randn(rows, m, generator=draw)
                right = x.double() @ weight.double().T
                size = (x.double().abs() @ weight.double().abs().T).norm()
                worst, count = max(worst, float((product(form, x) - right).norm() / size.clamp(min=1e-30))), count + 1
    numbers = {"greatest difference, as a share of |x| |w|": Measurement(worst, "", count)}
    return judged([] if worst < NEAR else [f"results differ by {worst:.2g}"], numbers)


def of_mask(form: Sparse) -> int:
    """Bytes as they are held."""
    return form.nbytes


def of_csr(form: Sparse) -> int:
    """Bytes in compressed rows: a position of 32 bits for each weight, and where rows begin."""
    return 6 * form.values.line().numel() + 4 * (form.shape[0] + 1)


def _bytes(lab: Lab, count: Callable[[Sparse], int]) -> Verdict:
    numbers, wrong = {}, []
    for zeros in ZEROS:
        weight, form = drawn(512, 2048, zeros)
        kept = form.values.line().numel()
        ours = count(form)
        for name, other in (("16 bits a weight", 2 * weight.numel()), ("compressed rows", of_csr(form)), ("Tiled-CSL", 4 * kept)):
            numbers[f"{zeros:.0%} zeros: bytes as a share of those of {name}"] = Measurement(ours / other, "", 1)
            if ours >= other:
                wrong.append(f"{zeros:.0%} zeros: no fewer bytes than {name}")
    return judged(wrong, numbers)


def _taking(pool: Sequence[Any], product: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    """A product with the next of a pool, round and round."""
    around = itertools.cycle(pool)
    return lambda: product(next(around))


def _time(lab: Lab, product: Product) -> Verdict:
    there = native()
    if there is None or there.level != "avx512":
        return Verdict("cannot be checked here", {}, "the products that read what is stored as fast as it comes need AVX-512")
    n, m = SHAPE
    numbers: dict[str, Measurement] = {}
    rounds, wrong = 8 if lab.quick else 40, []
    x = torch.randn(1, m, generator=torch.Generator().manual_seed(0)).bfloat16()
    for zeros in ZEROS:
        weight, form = drawn(n, m, zeros)
        with warnings.catch_warnings():
            # torch says that its sparse tensors are new
            warnings.simplefilter("ignore")
            found = weight.float().to_sparse_csr()
            rows = torch.sparse_csr_tensor(found.crow_indices().int(), found.col_indices().int(), found.values(), size=(n, m))
        wide = x.float().T.contiguous()
        # as many of each as no processor's caches hold, taken one after another
        copies = 12
        dense, csr = [weight.clone() for _ in range(copies)], [rows.clone() for _ in range(copies)]
        held = [Sparse(form.shape, form.mask.clone(), Dense(form.values.line().clone())) for _ in range(2 * copies)]
        calls = {
            "ours": _taking(held, lambda one: product(one, x)),
            "dense": _taking(dense, partial(F.linear, x)),
            "csr": _taking(csr, partial(torch.matmul, other=wide)),
        }
        took = dict(zip(calls, turns(list(calls.values()), rounds * copies, warm=copies), strict=True))
        ours = statistics.median(took["ours"])
        for name, told in (("dense", "torch's dense product in bf16"), ("csr", "torch's product of compressed rows in fp32")):
            ratio = statistics.median(took[name]) / ours
            numbers[f"{zeros:.0%} zeros: times as fast as {told}"] = Measurement(ratio, "", len(took[name]))
            if ratio <= 1:
                wrong.append(f"{zeros:.0%} zeros: {ratio:.2f} times as fast as {told}")
    return judged(wrong, numbers)


PAPER = Paper("Xia et al.", 2023, "arXiv:2309.10285")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        says="Products from what is stored are those of the dense matrix to rounding, for 0 to 99 % zeros anywhere and 1 to 100 rows.",
        where=PAPER,
        scale="random matrices of up to 300 x 1,000 in bf16, inputs in fp32, against fp64; no chance in it",
        check=partial(_exact, product=as_held),
        broken=partial(_exact, product=astray),
    ),
    Claim(
        says="With 60, 70 and 80 % zeros there are fewer bytes to read than of 16 bits a weight, of compressed rows and of Tiled-CSL.",
        where=PAPER,
        scale="a random matrix of 512 x 2,048, bytes counted; no chance in it",
        check=partial(_bytes, count=of_mask),
        broken=partial(_bytes, count=of_csr),
    ),
    Claim(
        says="With 60, 70 and 80 % zeros one row is multiplied faster than by the dense matrix, and than by torch's compressed rows.",
        where=PAPER,
        scale="random matrices of 5,632 x 2,048 that no cache holds, inputs in bf16 (of compressed rows in fp32, which is all that torch "
        "has), torch's threads, medians of 96 (in full 480) calls in turns",
        check=partial(_time, product=as_held),
        broken=partial(_time, product=through_dense),
        timed=True,
    ),
)
