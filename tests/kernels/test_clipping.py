"""What runs of weights err with each of several scales: the native loop is the reference, to the order of a sum."""

from __future__ import annotations

import pytest
import torch

from laconic.kernels import grids
from laconic.kernels.grids import Grid, fit_clipped, reference_errors
from laconic.kernels.native import LEVELS, Native, native


@pytest.fixture(params=LEVELS)
def each(request, monkeypatch):
    there = native()
    if request.param == "reference":
        monkeypatch.setattr(grids, "native", lambda: None)
    elif there is None or LEVELS.index(request.param) > LEVELS.index(there.level):
        pytest.skip(f"no {request.param} kernels here")
    else:
        monkeypatch.setattr(grids, "native", lambda: Native(there.module, request.param))


def scales_of(n: int, m: int, grid: Grid, steps: int):
    weight = torch.randn(n, m)
    shrink = torch.linspace(1, 0.4, steps)[:, None, None]
    low, high = grids._ends(weight, grid)
    return weight, *grids._scale_zero(low * shrink, high * shrink, grid)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (5, 64), (17, 130), (64, 300)])
@pytest.mark.parametrize(
    "grid",
    [Grid(1, 16), Grid(2, 7, symmetric=True), Grid(3, 64, zeros="half"), Grid(4, 32, scales="log8", zeros="half"), Grid(8, None)],
    ids=str,
)
@pytest.mark.parametrize("weighed", [False, True])
def test_errors_are_those_of_the_reference(each, size, grid, weighed):
    weight, scales, zeros = scales_of(*size, grid, 5)
    runs = grids.grouped(weight, grid)
    weigh = grids.grouped(torch.rand(1, size[1]), grid) if weighed else None
    found = grids._errors(runs, weigh, scales, zeros, 2**grid.bits - 1)
    wanted = reference_errors(runs, weigh, scales, zeros, 2**grid.bits - 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # as much where nothing lies side by side in memory
    apart = torch.stack([runs, runs], -1)[..., 0]
    torch.testing.assert_close(grids._errors(apart, weigh, scales, zeros, 2**grid.bits - 1), found, rtol=0, atol=0)


def test_what_is_not_in_fp32_is_left_to_the_reference(each):
    grid = Grid(3, 16)
    weight, scales, zeros = (x.double() for x in scales_of(4, 40, grid, 3))
    runs = grids.grouped(weight, grid)
    assert torch.equal(grids._errors(runs, None, scales, zeros, 7), reference_errors(runs, None, scales, zeros, 7))


def test_the_best_factor_is_taken_and_zeros_and_extremes_are_no_trouble(each):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2, :5] = 0, 1e-30, 1e30
    for grid in (Grid(2, 32), Grid(3, 32, symmetric=True, scales="log8")):
        scale, zero = fit_clipped(weight, grid)
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all()) and bool(torch.isfinite(zero).all())
        full = grids._scale_zero(*grids._ends(weight, grid), grid)
        runs = grids.grouped(weight[3:], grid)
        ours, plain = (reference_errors(runs, None, s[None, 3:], z[None, 3:], 2**grid.bits - 1) for s, z in ((scale, zero), full))
        assert bool((ours <= plain * 1.0001).all()) and float(ours.sum()) < 0.9 * float(plain.sum())
