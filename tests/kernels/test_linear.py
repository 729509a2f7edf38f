"""The native products with grouped codes against torch's own operations in fp64, over the sizes where kernels go wrong."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from laconic.kernels import linear
from laconic.kernels.bits import pack
from laconic.kernels.grids import Grid, encode, fit_range
from laconic.kernels.linear import (
    grouped_dense,
    grouped_linear,
    grouped_linear_int8,
    reference_dense,
    reference_linear,
    reference_linear_int8,
)
from laconic.kernels.native import LEVELS, Native, native

# a product in fp32 is wrong by no more than this share of |x| |w|; its native one does not do worse
NEAR = 1e-6
WIDTHS = (1, 7, 63, 64, 65, 172, 256, 300, 1024)
GROUPS = (None, 8, 16, 32, 64, 128, 256, 50)


def held(n: int, m: int, grid: Grid, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    scale, zero = fit_range(weight, grid)
    codes = pack(encode(weight, scale, zero, grid), grid.bits)
    return codes, scale.bfloat16(), None if grid.symmetric else pack((zero * grid.zero_steps).to(torch.uint8), grid.zero_bits)


def wrong(x: torch.Tensor, y: torch.Tensor, stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], grid: Grid) -> float:
    """Greatest error as a share of |x| times the greatest that a row of the weight can be."""
    m = x.shape[-1]
    exact = x.double() @ reference_dense(*stored, grid, m).double().T
    size = x.double().norm(dim=-1, keepdim=True) * (stored[1].double().amax(1) * 2 ** (grid.bits - 1) * m**0.5)
    return float(((y.double() - exact).abs() / size.clamp(min=1e-300)).max())


def apart(x: torch.Tensor, stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], grid: Grid) -> float:
    """As `wrong`, of the product with inputs of 8 bits against its reference: both round x alike, so only fp32 sums differ."""
    size = x.norm(dim=-1, keepdim=True) * (stored[1].float().amax(1) * 2 ** (grid.bits - 1) * x.shape[-1] ** 0.5)
    difference = grouped_linear_int8(x, *stored, grid) - reference_linear_int8(x, *stored, grid)
    return float((difference.abs() / size.clamp(min=1e-30)).max())


@pytest.fixture(params=[level for level in LEVELS if level != "reference"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    there = native()
    if there is None or LEVELS.index(request.param) > LEVELS.index(there.level):
        pytest.skip(f"no {request.param} kernels here")
    monkeypatch.setattr(linear, "native", lambda: Native(there.module, request.param))
    return str(request.param)


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_over_widths_and_groups(level: str, bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    for m, group, symmetric in itertools.product(WIDTHS, GROUPS, (True, False)):
        grid = Grid(bits, group, symmetric)
        stored = held(5, m, grid)
        assert torch.equal(grouped_dense(*stored, grid, m), reference_dense(*stored, grid, m)), (m, group, symmetric)
        for rows in (1, 2, 3, 7):
            # some columns far greater than others
            x = torch.randn(rows, m, generator=draw) * torch.randn(1, m, generator=draw).exp()
            assert wrong(x, grouped_linear(x, *stored, grid), stored, grid) < NEAR, (m, group, symmetric, rows)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_equal_with_zeros_half_way(level: str, bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    for (n, m), group, symmetric in itertools.product(((5, 65), (33, 1024)), (None, 16, 64, 128), (True, False)):
        grid = Grid(bits, group, symmetric, zeros="half")
        stored = held(n, m, grid)
        assert torch.equal(grouped_dense(*stored, grid, m), reference_dense(*stored, grid, m)), (m, group, symmetric)
        for rows in (1, 3, 40):
            x = torch.randn(rows, m, generator=draw) * torch.randn(1, m, generator=draw).exp()
            assert wrong(x, grouped_linear(x, *stored, grid), stored, grid) < NEAR, (m, group, symmetric, rows)
            assert apart(x, stored, grid) < NEAR, (m, group, symmetric, rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equal_for_many_rows_and_outputs(level: str, bits: int) -> None:
    grid = Grid(bits, 64)
    for n, rows in ((1, 49), (33, 1), (33, 50), (7, 600)):
        stored, x = held(n, 256, grid), torch.randn(rows, 256, generator=torch.Generator().manual_seed(n))
        assert wrong(x, grouped_linear(x, *stored, grid), stored, grid) < NEAR, (n, rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_rows_in_16_bits_are_what_torch_makes_of_the_matrix(level: str, bits: int) -> None:
    grid = Grid(bits, 64, True)
    stored, x = held(700, 256, grid), torch.randn(130, 256, generator=torch.Generator().manual_seed(bits)).bfloat16()
    found, reference = grouped_linear(x, *stored, grid), reference_linear(x, *stored, grid)
    assert found.dtype == torch.bfloat16
    exact = grouped_linear(x.float(), *stored, grid)
    # as near to the product of unrounded weights as the reference is, whose weights and results have 8 bits
    assert float((found.float() - exact).norm() / exact.norm()) <= max(
        2.0**-8, 1.05 * float((reference.float() - exact).norm() / exact.norm())
    )
    assert float((found.float() - reference.float()).norm() / exact.norm()) < 2.0**-8


def test_shapes_strides_and_dtypes(level: str) -> None:
    grid = Grid(4, 32)
    stored, x = held(6, 96, grid), torch.randn(3, 5, 2, 96, generator=torch.Generator().manual_seed(0))
    y = grouped_linear(x, *stored, grid)
    assert y.shape == (3, 5, 2, 6)
    apart = x.transpose(0, 2)
    assert not apart.is_contiguous()
    torch.testing.assert_close(grouped_linear(apart, *stored, grid), y.transpose(0, 2), rtol=0, atol=0)
    every = tuple(t[::2] for t in held(12, 96, grid, seed=3) if t is not None)
    assert wrong(x[0, 0], grouped_linear(x[0, 0], *every, grid), every, grid) < NEAR  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float16):
        low = grouped_linear(x.to(dtype), *stored, grid)
        assert low.dtype == dtype
        # many rows of bf16 are multiplied with weights in bf16 where the kernels have products of pairs, as the reference does
        rounded = dtype == torch.bfloat16 and linear.panels(level)
        want = reference_linear(x.to(dtype), *stored, grid) if rounded else grouped_linear(x.to(dtype).float(), *stored, grid)
        torch.testing.assert_close(low.float(), want.float(), rtol=1e-2, atol=1e-2)
    assert grouped_linear(x[:0], *stored, grid).shape == (0, 5, 2, 6)


def test_extreme_values(level: str) -> None:
    grid = Grid(4, 64)
    stored = held(4, 256, grid)
    base = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    for factor in (1e30, 1e-20, 1.0):
        assert wrong(base * factor, grouped_linear(base * factor, *stored, grid), stored, grid) < NEAR, factor
    assert torch.equal(grouped_linear(torch.zeros(2, 256), *stored, grid), torch.zeros(2, 4))
    # smaller than any weight's share of a result: zero, and not NaN
    assert torch.isfinite(grouped_linear(base * 1e-40, *stored, grid)).all()
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = base.clone()
        x[1, 200] = bad
        y = grouped_linear(x, *stored, grid)
        torch.testing.assert_close(y, reference_linear(x, *stored, grid), equal_nan=True, rtol=1e-4, atol=1e-4)
    # one entry that is 10,000 times the others leaves them their own precision, run by run
    x = base.clone()
    x[:, 3] = 1e4
    assert wrong(x, grouped_linear(x, *stored, grid), stored, grid) < NEAR


def test_rows_do_not_depend_on_each_other_or_on_threads(level: str) -> None:
    grid = Grid(4, 64)
    stored, x = held(40, 512, grid), torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    together = grouped_linear(x, *stored, grid)
    alone = torch.cat([grouped_linear(row[None], *stored, grid) for row in x])
    # sums of 512 terms in another order where many rows go another way: a few last digits of fp32, of values up to 500
    torch.testing.assert_close(together, alone, rtol=1e-6 if level == "plain" else 0, atol=1e-4 if level == "plain" else 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        assert torch.equal(grouped_linear(x, *stored, grid), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_int8_inputs_equal_over_widths_groups_and_rows(level: str, bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    for number, (m, group) in enumerate(itertools.product((1, 65, 300, 512), (None, 8, 32, 64, 192, 256, 50))):
        grid = Grid(bits, group, number % 2 == 0)
        stored = held(37, m, grid)
        for rows in (1, 3, 5, 26):
            x = torch.randn(rows, m, generator=draw) * torch.randn(1, m, generator=draw).exp()
            assert apart(x, stored, grid) < NEAR, (m, group, grid.symmetric, rows)
    grid = Grid(bits, 64)
    for n, rows in ((1, 49), (33, 13), (7, 600)):
        stored, x = held(n, 256, grid), torch.randn(rows, 256, generator=draw)
        assert apart(x, stored, grid) < NEAR, (n, rows)


def test_int8_inputs_are_what_they_say() -> None:
    """By hand: a run of 4 columns, x = (127, -63.5, 0.4, 12.7) / 10 is 127, -64, 0, 13 steps of 0.01; halves go to the even number."""
    grid = Grid(4, 4, symmetric=True)
    codes, scales = pack(torch.tensor([[8, 9, 10, 7], [0, 15, 8, 8]], dtype=torch.uint8), 4), torch.tensor([[0.5], [2.0]]).bfloat16()
    x = torch.tensor([[12.7, -6.35, 0.04, 1.27]])
    want = torch.tensor([[(-64 + 0 - 13) * 0.1 * 0.5, (127 * -8 + -64 * 7) * 0.1 * 2.0]])
    torch.testing.assert_close(reference_linear_int8(x, codes, scales, None, grid), want)
    torch.testing.assert_close(grouped_linear_int8(x, codes, scales, None, grid), want)


def test_int8_inputs_do_not_saturate(level: str) -> None:
    """All codes and all inputs at their ends: pairs of 16 bits are then over what 16 bits hold."""
    for bits, sign, rows in itertools.product(range(1, 9), (1.0, -1.0), (1, 6)):
        grid = Grid(bits, 128)
        codes, zeros = torch.full((5, 256 * bits // 8), 255, dtype=torch.uint8), torch.zeros(5, -(-2 * bits // 8), dtype=torch.uint8)
        y = grouped_linear_int8(torch.full((rows, 256), 127 * sign), codes, torch.ones(5, 2).bfloat16(), zeros, grid)
        assert torch.equal(y, torch.full((rows, 5), sign * 127 * 256 * (2**bits - 1))), (bits, sign, rows)


def test_int8_inputs_with_shapes_strides_dtypes_and_extremes(level: str) -> None:
    grid = Grid(4, 32)
    stored, x = held(6, 96, grid), torch.randn(3, 5, 2, 96, generator=torch.Generator().manual_seed(0))
    y = grouped_linear_int8(x, *stored, grid)
    assert y.shape == (3, 5, 2, 6)
    torch.testing.assert_close(grouped_linear_int8(x.transpose(0, 2), *stored, grid), y.transpose(0, 2), rtol=0, atol=0)
    every = tuple(t[::2] for t in held(12, 96, grid, seed=3) if t is not None)
    assert apart(x[0, 0], every, grid) < NEAR  # type: ignore[arg-type]
    for dtype, rows in itertools.product((torch.bfloat16, torch.float16), (slice(1), slice(3))):
        low = x[rows].to(dtype)
        found = grouped_linear_int8(low, *stored, grid)
        assert found.dtype == dtype
        # the same but for the last rounding of a sum in fp32
        torch.testing.assert_close(found, reference_linear_int8(low, *stored, grid), rtol=1e-2, atol=1e-4)
    assert grouped_linear_int8(x[:0], *stored, grid).shape == (0, 5, 2, 6)
    for rows in (1, 7):
        base = x.reshape(-1, 96)[:rows]
        for factor in (1e30, 1e-20, 1e-40, 0.0):
            assert apart(base * factor, stored, grid) < NEAR, factor
        assert torch.equal(grouped_linear_int8(base * 0, *stored, grid), torch.zeros(rows, 6))
        for bad in (float("nan"), float("inf"), -float("inf")):
            odd = base.clone()
            odd[-1, 90] = bad
            y = grouped_linear_int8(odd, *stored, grid)
            torch.testing.assert_close(y[-1:], reference_linear(odd[-1:], *stored, grid), equal_nan=True)
            torch.testing.assert_close(y[:-1], grouped_linear_int8(base[:-1], *stored, grid), rtol=1e-5, atol=1e-5)


def test_int8_inputs_whatever_the_threads(level: str) -> None:
    grid, before = Grid(4, 64), torch.get_num_threads()
    for n, rows in ((40, 1), (200, 4), (30, 100)):
        stored, x = held(n, 512, grid), torch.randn(rows, 512, generator=torch.Generator().manual_seed(0))
        y = grouped_linear_int8(x, *stored, grid)
        try:
            torch.set_num_threads(3 if before == 1 else 1)
            assert torch.equal(grouped_linear_int8(x, *stored, grid), y)
        finally:
            torch.set_num_threads(before)


def test_differentiable_in_x_and_known_to_torch() -> None:
    grid = Grid(4, 32)
    stored, x = held(6, 96, grid), torch.randn(3, 96, requires_grad=True)
    for product in (grouped_linear, grouped_linear_int8):
        x.grad = None
        product(x, *stored, grid).sum().backward()
        torch.testing.assert_close(x.grad, reference_dense(*stored, grid, 96).sum(0).expand(3, 96))
    fixed = x.detach()
    known = torch.ops.laconic.grouped_linear_int8
    torch.library.opcheck(known.default, (fixed, *stored, 4, 32), test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(known(fixed, *stored, 4, 32), reference_linear_int8(fixed, *stored, grid))
    torch.library.opcheck(torch.ops.laconic.grouped_linear.default, (fixed, *stored, 4, 32), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.laconic.grouped_dense.default, (*stored, 4, 32, 96), test_utils=("test_schema", "test_faketensor"))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.ops.laconic.grouped_linear(fixed, *stored, 4, 32), reference_linear(fixed, *stored, grid), rtol=1e-3, atol=1e-3
        )


def test_wrong_input_is_named() -> None:
    grid = Grid(4, 32)
    codes, scales, zeros = held(6, 96, grid)
    x = torch.randn(2, 96)
    with pytest.raises(ValueError, match=r"codes have shape \(6, 48\); 6 rows of 100 codes"):
        grouped_linear(torch.randn(2, 100), codes, scales, zeros, grid)
    with pytest.raises(ValueError, match="scales have shape"):
        grouped_linear(x, codes, scales[:, :2], zeros, grid)
    with pytest.raises(ValueError, match="zeros have shape"):
        grouped_linear(x, codes, scales, codes, grid)
    with pytest.raises(TypeError, match=r"scales are torch\.float32"):
        grouped_linear(x, codes, scales.float(), zeros, grid)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        grouped_linear(x.double(), codes, scales, zeros, grid)
    with pytest.raises(ValueError, match=r"codes have shape \(6, 48\); 6 rows of 100 codes"):
        grouped_linear_int8(torch.randn(2, 100), codes, scales, zeros, grid)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        grouped_linear_int8(x.double(), codes, scales, zeros, grid)


def test_an_unknown_wish_is_said_and_a_reference_is_always_there() -> None:
    line = "from laconic.kernels.native import native; found = native(); print(found and found.level)"
    for wish in ("reference", "nonsense"):
        done = subprocess.run(
            [sys.executable, "-c", line], env={**os.environ, "LACONIC_KERNELS": wish}, capture_output=True, text=True, check=True
        )
        if wish == "reference":
            assert done.stdout.strip() == "None" and not done.stderr
        else:
            assert "LACONIC_KERNELS=nonsense is none of" in done.stderr


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
for turn in range(int(sys.argv[3])):
    n, m, rows, bits = (int(draw.integers(1, top)) for top in (40, 700, 30, 9))
    group = int(draw.choice([0, 8, 16, 32, 64, 128, 256, int(draw.integers(1, 300))]))
    wide = m if group == 0 or group > m else group
    g = -(-m // wide)
    half = bits < 8 and bool(draw.integers(2))
    codes = draw.integers(0, 256, (n, -(-m * bits // 8)), dtype=np.uint8)
    scales = (draw.random((n, g), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    zeros = draw.integers(0, 256, (n, -(-g * (bits + half) // 8)), dtype=np.uint8)
    x = draw.standard_normal((rows, m), dtype=np.float32)
    bf16 = bool(draw.integers(2))
    given = (x.view(np.uint32) >> 16).astype(np.uint16) if bf16 else x
    at, stride = (zeros.ctypes.data, zeros.shape[1]) if draw.integers(2) else (0, 0)
    stored = (codes.ctypes.data, codes.shape[1], scales.ctypes.data, at, stride, n, m, bits, group, half)
    found = []
    levels = ["plain", "avx2", "avx512"]
    for level in levels[: levels.index(module.best()) + 1]:
        dense = np.full((n, m), np.nan, np.float32)
        module.dense(*stored, dense.ctypes.data, 2, level)
        products = []
        for product in (module.linear, module.linear_int8):
            # of inputs of bf16 the result is bf16, and both are compared in fp32
            out = np.full((rows, n), 65535 if bf16 else np.nan, np.uint16 if bf16 else np.float32)
            assert product(given.ctypes.data, bf16, rows, *stored, out.ctypes.data, 2, level)
            products.append((out.astype(np.uint32) << 16).view(np.float32) if bf16 else out)
        found.append((products[0], dense, products[1]))
    for out, dense, near in found[1:]:
        assert (dense == found[0][1]).all(), (n, m, rows, bits, group)
        size = np.linalg.norm(x, axis=1)[:, None] * (2.0**bits * m**0.5) + 1e-9
        # in bf16 the last rounding may go the other way, and many rows are multiplied with weights in bf16
        least = 1e-4 * size + (np.abs(out) * 2.0**-7 + 2.0**-8 * size if bf16 else 0)
        assert (np.abs(out - found[0][0]) < least).all(), (n, m, rows, bits, group, bf16)
        least = 1e-4 * size + (np.abs(near) * 2.0**-7 if bf16 else 0)
        assert (np.abs(near - found[0][2]) < least).all(), ("int8", n, m, rows, bits, group, bf16)
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 200)
