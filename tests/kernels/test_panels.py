"""Products of many rows in bf16, which a matrix passes some dense rows at a time, against torch's in fp64 with the same rounded weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laconic.kernels.bits import pack, packed_width
from laconic.kernels.grids import Grid, encode, fit_range
from laconic.kernels.levels import Levels
from laconic.kernels.linear import grouped_linear, panels, reference_dense
from laconic.kernels.lookup import lookup_linear
from laconic.kernels.lookup import reference_dense as named_dense
from laconic.kernels.native import native
from laconic.kernels.sparse import reference_sparse_rows, sparse_linear

there = native()
pytestmark = pytest.mark.skipif(there is None or not panels(there.level), reason="this processor has no such products, or torch is quicker")

# a result in bf16 is off by half of its last place, a sum in fp32 by much less
ROUNDED = 2.0**-8
FLOATS = (Levels.mxfp4(), Levels.nvfp4(), Levels.fp8(128), Levels.fp8(48), Levels(6, "e2m3", 32, "e8m0"))
LEVELS = (*FLOATS, Levels.codebook(4), Levels.codebook(3))


def grouped(n: int, m: int, grid: Grid) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The matrix as bf16 has it, and the product."""
    weight = torch.randn(n, m, generator=torch.Generator().manual_seed(n + m))
    scale, zero = fit_range(weight, grid)
    stored = pack(encode(weight, scale, zero, grid), grid.bits), scale.bfloat16()
    zeros = None if grid.symmetric else pack((zero * grid.zero_steps).to(torch.uint8), grid.zero_bits)
    return reference_dense(*stored, zeros, grid, m).bfloat16(), lambda x: grouped_linear(x, *stored, zeros, grid)


def named(n: int, m: int, levels: Levels) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    draw = torch.Generator().manual_seed(n + m)
    codes = torch.randint(0, 256, (n, packed_width(m, levels.bits)), dtype=torch.uint8, generator=draw)
    if levels.bits == 8:
        # a bit that is clear leaves no code that is no number
        codes &= 0xFB
    g = levels.count(m)
    if levels.scales == "bf16":
        scales = torch.rand(n, g, generator=draw).bfloat16()
    else:
        scales = torch.randint(100, 120, (n, g), dtype=torch.uint8, generator=draw)
    whole = torch.full((1,), 0.01) if levels.scales == "e4m3" else None
    table = torch.randn(2**levels.bits, generator=draw).sort().values.bfloat16() if levels.table == "codebook" else None
    stored = codes, scales, whole, table, levels
    return named_dense(*stored, m).bfloat16(), lambda x: lookup_linear(x, *stored)


def sparse(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    draw = torch.Generator().manual_seed(n + m)
    mask = torch.rand(n, m, generator=draw) < 0.3
    bits, kept = pack(mask.to(torch.uint8), 1), torch.randn(int(mask.sum()), generator=draw).to(dtype)
    return reference_sparse_rows(bits, kept, m).bfloat16(), lambda x: sparse_linear(x, bits, kept)


def wrong(x: Tensor, found: Tensor, dense: Tensor) -> float:
    """Greatest error as a share of the result and of |x| |w|, whichever is more."""
    exact = x.double() @ dense.double().T
    size = x.double().norm(dim=-1, keepdim=True) * dense.double().norm(dim=-1)
    return float(((found.double() - exact).abs() / torch.maximum(exact.abs(), size * 1e-3).clamp(min=1e-30)).max())


def rows_of(rows: int, m: int) -> Tensor:
    return torch.randn(rows, m, generator=torch.Generator().manual_seed(rows)).bfloat16()


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_group(bits: int) -> None:
    # widths around the columns that are made dense at once, rows of the weight around a panel, rows of x around tiles
    shapes = itertools.cycle(itertools.product((1, 31, 32, 33, 70, 200), (13, 24, 25, 50)))
    for m, group, half in itertools.product((1, 31, 65, 128, 130, 300, 512), (None, 16, 32, 48, 64, 128, 160), (False, True)):
        (n, rows), grid = next(shapes), Grid(bits, group, zeros="half") if half and bits < 8 else Grid(bits, group, symmetric=not half)
        dense, product = grouped(n, m, grid)
        x = rows_of(rows, m)
        assert wrong(x, product(x), dense) < ROUNDED, (m, group, half, n, rows)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_table(levels: Levels) -> None:
    for m, n, rows in ((64, 33, 13), (130, 70, 24), (300, 5, 50), (1024, 64, 26)):
        dense, product = named(n, m, levels)
        x = rows_of(rows, m)
        assert wrong(x, product(x), dense) < ROUNDED, (m, n, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparse_rows_pass_too(dtype: torch.dtype) -> None:
    for m, n, rows in ((31, 33, 17), (300, 70, 26), (5632, 96, 40)):
        dense, product = sparse(n, m, dtype)
        x = rows_of(rows, m)
        assert wrong(x, product(x), dense) < ROUNDED, (m, n, rows)


def test_long_rows_come_in_parts_and_many_of_x_in_strips() -> None:
    for m, n, rows in ((2600, 33, 14), (5632, 600, 30), (9001, 65, 13), (2600, 40, 2100)):
        dense, product = grouped(n, m, Grid(4, 128, symmetric=True))
        x = rows_of(rows, m)
        assert wrong(x, product(x), dense) < ROUNDED, (m, n, rows)
    dense, product = named(130, 5632, Levels.mxfp4())
    x = rows_of(30, 5632)
    assert wrong(x, product(x), dense) < ROUNDED


def test_rows_depend_on_nothing_but_themselves() -> None:
    dense, product = grouped(70, 300, Grid(4, 64))
    x = rows_of(40, 300)
    y = product(x)
    torch.testing.assert_close(product(x.view(2, 20, 300).transpose(0, 1)), y.view(2, 20, 70).transpose(0, 1), rtol=0, atol=0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before == 1 else 1)
        assert torch.equal(product(x), y)
    finally:
        torch.set_num_threads(before)
    for bad in (float("nan"), float("inf"), -float("inf")):
        odd = x.clone()
        odd[7, 299] = bad
        found = product(odd)
        rest = torch.arange(40) != 7
        assert torch.equal(found[rest], y[rest])
        torch.testing.assert_close(found[7].float(), odd[7].float() @ dense.float().T, equal_nan=True, rtol=1e-2, atol=1e-2)
    for factor in (1e30, 1e-20):
        assert wrong(x * factor, product(x * factor), dense) < ROUNDED
    assert torch.equal(product(x * 0), torch.zeros(40, 70).bfloat16())
