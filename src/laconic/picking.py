"""How products with codes go on this machine, measured once: by a kernel up to some rows of x, over dense rows beyond."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from laconic.kernels import picks
from laconic.kernels.bits import packed_width
from laconic.kernels.grids import Grid
from laconic.kernels.levels import Levels
from laconic.kernels.linear import grouped_linear
from laconic.kernels.lookup import lookup_linear
from laconic.kernels.native import native
from laconic.kernels.picks import EVERY, PRODUCTS, Pick, Product, forced
from laconic.pipeline import Log, Progress, quiet

# rows of x that are tried, one after another, and how often
TRIED, TURNS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 3


def known(progress: Progress = quiet, log: Log = print) -> list[Pick]:
    """What is known of this machine, with torch's threads; measured where it is not yet, and kept. Nothing where there are no kernels, or
    where that is not wanted."""
    found = picks.kept()
    if found or native() is None or picks.file() is None:
        return found
    found = measured(progress=lambda done, total: progress("timing", done, total, "products with codes, once on this machine"))
    where = picks.keep(found)
    log(f"products with codes were timed on this machine: {f'kept in {where}' if where else 'that cannot be kept'}")
    return found


def measured(
    products: tuple[Product, ...] = PRODUCTS, progress: Callable[[int, int], None] | None = None, tried: tuple[int, ...] = TRIED
) -> list[Pick]:
    """Both ways timed on this machine, turn by turn, with more and more rows of x until the kernel is the slower one twice."""
    found = []
    with torch.inference_mode():
        for number, product in enumerate(products):
            if progress is not None:
                progress(number, len(products))
            found.append(_measured(product, tried))
    return found


def _measured(product: Product, tried: tuple[int, ...]) -> Pick:
    run, m = _case(product)
    ms: dict[int, tuple[float, float]] = {}
    best, slower = 0, 0
    for rows in tried:
        x = torch.randn(rows, m, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16 if product.narrow else torch.float32)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(TURNS):
            for way, took in zip((EVERY, 0), times, strict=True):
                with forced(way):
                    began = time.perf_counter()
                    run(x)
                    took.append(time.perf_counter() - began)
        kernel, dense = (1e3 * min(took) for took in times)
        ms[rows] = round(kernel, 4), round(dense, 4)
        best, slower = (rows, 0) if kernel <= dense else (best, slower + 1)
        if slower == 2:
            break
    return Pick(product, EVERY if best == tried[-1] else best, ms)


def _case(product: Product) -> tuple[Callable[[Tensor], Tensor], int]:
    """A product with a matrix of its kind, and the width of x."""
    n, m = (2048, 2048) if product.large else (512, 1024)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (n, packed_width(m, product.bits)), generator=generator, dtype=torch.uint8)
    if product.form == "grouped":
        grid = Grid(product.bits, 128, symmetric=True)
        scales = (0.01 + torch.rand(n, m // 128, generator=generator)).bfloat16()
        return lambda x: grouped_linear(x, codes, scales, None, grid), m
    levels = Levels.codebook(product.bits, 64) if product.bits == 8 else Levels(4, "e2m1", 64)
    scales = (0.01 + torch.rand(n, m // 64, generator=generator)).bfloat16()
    table = torch.linspace(-1, 1, 2**product.bits).bfloat16() if product.bits == 8 else None
    return lambda x: lookup_linear(x, codes, scales, None, table, levels), m
