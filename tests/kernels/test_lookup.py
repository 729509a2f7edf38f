"""Products with codes that name values of a table against torch's own operations in fp64, over the sizes where kernels go wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from laconic.kernels import lookup
from laconic.kernels.bits import pack
from laconic.kernels.levels import FLOATS, Levels, encode, fit_scale, fit_table, stored_scales, whole_of
from laconic.kernels.linear import even, panels
from laconic.kernels.lookup import lookup_dense, lookup_linear, reference_dense, reference_linear
from laconic.kernels.native import LEVELS, Native, native

# a product in fp32 is wrong by no more than this share of |x| |w|; its native one does not do worse
NEAR = 1e-6
WIDTHS = (1, 7, 63, 64, 65, 172, 256, 300, 1024)
TABLES = [Levels(bits) for bits in range(1, 9)] + [Levels(1 + sum(FLOATS[name][:2]), name) for name in FLOATS]  # type: ignore[arg-type]
SCALES = ("bf16", "e8m0", "e4m3")

Stored = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@lru_cache(maxsize=2048)
def held(n: int, m: int, levels: Levels, seed: int = 0) -> Stored:
    weight = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    whole = whole_of(weight.abs().max(), levels)
    scale = fit_scale(weight, levels, whole)
    table = fit_table(weight, scale, levels) if levels.table == "codebook" else None
    return pack(encode(weight, scale, levels, table), levels.bits), stored_scales(scale, levels, whole), whole, table


def rounds(x: Tensor, level: str, levels: Levels) -> bool:
    """Whether weights are rounded to bf16: by panels, which many rows of bf16 pass."""
    many = x.numel() // x.shape[-1] > 12
    return many and x.dtype == torch.bfloat16 and panels(level) and even(levels.group or 0, x.shape[-1])


def wrong(x: Tensor, y: Tensor, stored: Stored, levels: Levels, rounded: bool = False) -> float:
    """Greatest error as a share of |x| |w|."""
    dense = reference_dense(*stored, levels, x.shape[-1])
    w = (dense.bfloat16() if rounded else dense).double()
    size = x.double().norm(dim=-1, keepdim=True) * w.norm(dim=-1)
    return float(((y.double() - x.double() @ w.T).abs() / size.clamp(min=1e-300)).max())


@pytest.fixture(params=[level for level in LEVELS if level != "reference"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    there = native()
    if there is None or LEVELS.index(request.param) > LEVELS.index(there.level):
        pytest.skip(f"no {request.param} kernels here")
    monkeypatch.setattr(lookup, "native", lambda: Native(there.module, request.param))
    return str(request.param)


@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t.table}{t.bits}")
def test_equal_over_widths_groups_and_scales(level: str, table: Levels) -> None:
    draw = torch.Generator().manual_seed(table.bits)
    for number, (m, group) in enumerate(itertools.product(WIDTHS, (None, 8, 16, 32, 64, 128, 256, 50))):
        levels = Levels(table.bits, table.table, group, SCALES[number % 3])  # type: ignore[arg-type]
        stored = held(5, m, levels)
        assert torch.equal(lookup_dense(*stored, levels, m), reference_dense(*stored, levels, m)), (m, levels)
        # rows go together in eights, then fours, twos and ones
        for rows in (1, 3, 11, 15):
            # some columns far greater than others
            x = torch.randn(rows, m, generator=draw) * torch.randn(1, m, generator=draw).exp()
            assert wrong(x, lookup_linear(x, *stored, levels), stored, levels) < NEAR, (m, levels, rows)
            low = x.bfloat16()
            # the result is rounded to bf16
            assert wrong(low, lookup_linear(low, *stored, levels), stored, levels, rounds(low, level, levels)) < 2**-8, (m, levels, rows)


@pytest.mark.parametrize("levels", [Levels.mxfp4(), Levels.nvfp4(), Levels.fp8(128), Levels.codebook(3), Levels.codebook(4, 128)], ids=str)
def test_equal_for_many_rows_and_outputs(level: str, levels: Levels) -> None:
    draw = torch.Generator().manual_seed(0)
    for n, rows in ((1, 49), (33, 1), (33, 50), (21, 5), (7, 96), (19, 513)):
        stored, x = held(n, 320, levels), torch.randn(rows, 320, generator=draw)
        assert wrong(x, lookup_linear(x, *stored, levels), stored, levels) < NEAR, (n, rows)
        low = x.bfloat16()
        assert wrong(low, lookup_linear(low, *stored, levels), stored, levels, rounds(low, level, levels)) < 2**-8, (n, rows)


def test_sums_of_bf16_inputs_are_those_of_fp32(level: str) -> None:
    """One output of exact products that stay below 2^24: no rounding anywhere, whichever instructions add them."""
    levels = Levels(4, "e2m1", 32, "e8m0")
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 256) % 16
    stored = (pack(codes, 4), torch.full((1, 8), 128, dtype=torch.uint8), None, None)
    x = ((torch.arange(256) % 7).float() - 3)[None].bfloat16()
    want = (x.double() @ reference_dense(*stored, levels, 256).double().T).bfloat16()
    assert torch.equal(lookup_linear(x, *stored, levels), want)


def test_shapes_strides_and_dtypes(level: str) -> None:
    levels = Levels.nvfp4()
    stored, x = held(6, 96, levels), torch.randn(3, 5, 2, 96, generator=torch.Generator().manual_seed(0))
    y = lookup_linear(x, *stored, levels)
    assert y.shape == (3, 5, 2, 6)
    torch.testing.assert_close(lookup_linear(x.transpose(0, 2), *stored, levels), y.transpose(0, 2), rtol=0, atol=0)
    twice = held(12, 96, levels, seed=3)
    every = (twice[0][::2], twice[1][::2], *twice[2:])
    assert not every[0].is_contiguous()
    assert wrong(x[0, 0], lookup_linear(x[0, 0], *every, levels), every, levels) < NEAR
    for dtype in (torch.bfloat16, torch.float16):
        low = lookup_linear(x.to(dtype), *stored, levels)
        assert low.dtype == dtype
        # many rows of bf16 are multiplied with weights in bf16 where the kernels have products of pairs, as the reference does
        given = x.to(dtype)
        want = reference_linear(given, *stored, levels) if rounds(given, level, levels) else lookup_linear(given.float(), *stored, levels)
        torch.testing.assert_close(low.float(), want.float(), rtol=1e-2, atol=1e-2)
    assert lookup_linear(x[:0], *stored, levels).shape == (0, 5, 2, 6)


@pytest.mark.parametrize("rows", [2, 300])
def test_extreme_values(level: str, rows: int) -> None:
    for levels in (Levels.mxfp4(), Levels.fp8(), Levels.codebook(4)):
        stored = held(4, 256, levels)
        base = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
        for factor in (1e30, 1e-20, 1.0):
            assert wrong(base * factor, lookup_linear(base * factor, *stored, levels), stored, levels) < NEAR, factor
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(lookup_linear(torch.zeros(rows, 256, dtype=dtype), *stored, levels), torch.zeros(rows, 4, dtype=dtype))
            # smaller than any weight's share of a result: zero, and not NaN
            assert torch.isfinite(lookup_linear((base * 1e-40).to(dtype), *stored, levels)).all()
            for bad in (float("nan"), float("inf"), -float("inf")):
                x = base.to(dtype, copy=True)
                x[1, 200] = bad
                want = reference_linear(x.float(), *stored, levels)
                torch.testing.assert_close(lookup_linear(x, *stored, levels).float(), want, equal_nan=True, rtol=1e-2, atol=0.1)


def test_rows_do_not_depend_on_each_other_or_on_threads(level: str) -> None:
    levels, before = Levels.mxfp4(), torch.get_num_threads()
    stored, x = held(41, 512, levels), torch.randn(15, 512, generator=torch.Generator().manual_seed(0))
    most = level != "avx512"
    for given in (x, x.bfloat16()):
        alone = torch.cat([lookup_linear(row[None], *stored, levels) for row in given])
        # sums of 512 terms in another order where many rows go another way
        torch.testing.assert_close(lookup_linear(given, *stored, levels), alone, rtol=2**-7 if most else 0, atol=1e-4 if most else 0)
    for n, rows in ((40, 1), (200, 4), (30, 40)):
        stored, x = held(n, 512, levels), torch.randn(rows, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
        y = lookup_linear(x, *stored, levels)
        try:
            torch.set_num_threads(2 if before == 1 else 1)
            assert torch.equal(lookup_linear(x, *stored, levels), y)
        finally:
            torch.set_num_threads(before)


def test_differentiable_in_x_and_known_to_torch() -> None:
    known, dense = torch.ops.laconic.lookup_linear, torch.ops.laconic.lookup_dense
    for levels in (Levels.nvfp4(), Levels.codebook(3, 32)):
        stored, x = held(6, 96, levels), torch.randn(3, 96, requires_grad=True)
        lookup_linear(x, *stored, levels).sum().backward()
        torch.testing.assert_close(x.grad, reference_dense(*stored, levels, 96).sum(0).expand(3, 96))
        fixed, words = x.detach(), (levels.bits, levels.table, levels.group, levels.scales)
        torch.library.opcheck(known.default, (fixed, *stored, *words), test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(dense.default, (*stored, *words, 96), test_utils=("test_schema", "test_faketensor"))
        torch.testing.assert_close(known(fixed, *stored, *words), reference_linear(fixed, *stored, levels), rtol=1e-4, atol=1e-4)


def test_wrong_input_is_named() -> None:
    levels, x = Levels.mxfp4(), torch.randn(2, 96)
    codes, scales, _, _ = held(6, 96, levels)
    with pytest.raises(ValueError, match=r"codes have shape \(6, 48\); 6 rows of 100 codes"):
        lookup_linear(torch.randn(2, 100), codes, scales, None, None, levels)
    with pytest.raises(ValueError, match="scales have shape"):
        lookup_linear(x, codes, scales[:, :2], None, None, levels)
    with pytest.raises(TypeError, match=r"scales are torch\.float32"):
        lookup_linear(x, codes, scales.float(), None, None, levels)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        lookup_linear(x.double(), codes, scales, None, None, levels)
    with pytest.raises(ValueError, match="table is given"):
        lookup_linear(x, codes, scales, None, torch.zeros(16).bfloat16(), levels)
    with pytest.raises(ValueError, match="table is missing"):
        lookup_linear(x, codes, torch.ones(6, 2).bfloat16(), None, None, Levels.codebook(4))
    with pytest.raises(ValueError, match=r"table have shape \(8,\)"):
        lookup_linear(x, codes, torch.ones(6, 2).bfloat16(), None, torch.zeros(8).bfloat16(), Levels.codebook(4))
    with pytest.raises(ValueError, match="whole is missing"):
        lookup_linear(x, codes, torch.ones(6, 6, dtype=torch.uint8), None, None, Levels.nvfp4())


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
def narrow(x): return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
def widen(x): return (x.astype(np.uint32) << 16).view(np.float32)
for turn in range(int(sys.argv[3])):
    n, m, rows, bits = (int(draw.integers(1, top)) for top in (40, 700, 30, 9))
    group = int(draw.choice([0, 8, 16, 32, 64, 128, 256, int(draw.integers(1, 300))]))
    wide = m if group == 0 or group > m else group
    g = -(-m // wide)
    kind, scaling = (int(draw.integers(0, {4: 2, 6: 2, 8: 4}.get(bits, 1))), int(draw.integers(3)))
    table = draw.standard_normal(2**bits, dtype=np.float32)
    if kind == 1:
        table[2 ** (bits - 1):] = -table[: 2 ** (bits - 1)]
    if kind > 1:
        # a float format of 8 bits, its last codes as numbers too
        mantissa, bias = (3, 7) if kind == 2 else (2, 15)
        e, f = np.divmod(np.arange(128), 2**mantissa)
        half = np.where(e > 0, (1 + f / 2.0**mantissa) * 2.0 ** (e - bias), f / 2.0**mantissa * 2.0 ** (1 - bias))
        table = np.concatenate([half, -half])
    table = narrow(table)
    codes = draw.integers(0, 256, (n, -(-m * bits // 8)), dtype=np.uint8)
    scales = [lambda: narrow(draw.random((n, g))), lambda: draw.integers(110, 130, (n, g), dtype=np.uint8),
              lambda: draw.integers(0, 127, (n, g), dtype=np.uint8)][scaling]()
    whole = np.array([draw.random() + 0.5], np.float32)
    x = draw.standard_normal((rows, m), dtype=np.float32)
    bf16 = bool(draw.integers(2))
    given = narrow(x) if bf16 else x
    stored = (codes.ctypes.data, codes.shape[1], scales.ctypes.data, scaling, whole.ctypes.data if scaling == 2 else 0, table.ctypes.data,
              kind, n, m, bits, group)
    found = []
    levels = ["plain", "avx2", "avx512"]
    for level in levels[: levels.index(module.best()) + 1]:
        # of inputs of bf16 the result is bf16, and both are compared in fp32
        out = np.full((rows, n), 65535 if bf16 else np.nan, np.uint16 if bf16 else np.float32)
        dense = np.full((n, m), np.nan, np.float32)
        module.lookup_linear(given.ctypes.data, bf16, rows, *stored, out.ctypes.data, 2, level)
        module.lookup_dense(*stored, dense.ctypes.data, 2, level)
        found.append((widen(out) if bf16 else out, dense))
    for out, dense in found[1:]:
        assert (dense == found[0][1]).all(), (n, m, rows, bits, group, scaling, kind)
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(dense, axis=1) + 1e-9
        # in bf16 the last rounding may go the other way, and many rows are multiplied with weights in bf16
        least = 1e-5 * size + (np.abs(out) * 2.0**-7 + 2.0**-8 * size if bf16 else 0)
        assert (np.abs(out - found[0][0]) < least).all(), (n, m, rows, bits, group, scaling, kind, bf16)
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 200)
