"""The native products with sparse matrices against torch's own operations in fp64, over the sizes where kernels go wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from laconic.core.packed import Dense, Held, Packed, Sum, restore
from laconic.kernels import sparse
from laconic.kernels.bits import pack, packed_width
from laconic.kernels.grids import Grid
from laconic.kernels.native import LEVELS, Native, native
from laconic.kernels.sparse import (
    Codes,
    Kept,
    reference_sparse_linear,
    reference_sparse_rows,
    row_starts,
    sparse_linear,
    sparse_pixels,
    sparse_rows,
)
from laconic.methods.prune.cut.sparse import Sparse
from laconic.methods.quantize.grid.grouped import Grouped

# a product in fp32 is wrong by no more than this share of its norm; one in bf16 by its last rounding, and that of weights that are not bf16
NEAR = 1e-6
NEAR_BF16 = 2.0**-7
WIDTHS = (1, 7, 8, 31, 32, 33, 63, 64, 172, 300, 1024)
KEEPS = (0.0, 0.02, 0.3, 0.5, 1.0)


def masked(n: int, m: int, keep: float, draw: torch.Generator) -> tuple[torch.Tensor, int]:
    """Packed bits, and how many are set."""
    mask = torch.rand(n, m, generator=draw) < keep
    return pack(mask.to(torch.uint8), 1), int(mask.sum())


def coded(rows: int, width: int, grid: Grid, draw: torch.Generator) -> Codes:
    """Any codes."""
    g = grid.count(width) if width else 0
    zeros = torch.randint(0, 256, (rows, packed_width(g, grid.zero_bits)), generator=draw, dtype=torch.uint8)
    codes = torch.randint(0, 256, (rows, packed_width(width, grid.bits)), generator=draw, dtype=torch.uint8)
    return Codes(codes, torch.rand(rows, g, generator=draw).bfloat16(), None if grid.symmetric else zeros, grid, width)


def apart(x: torch.Tensor, mask: torch.Tensor, kept: Kept, starts: torch.Tensor | None = None) -> float:
    """Norm of the difference to the product in fp64, as a share of what the greatest rounding errors are shares of: |x| |w|."""
    dense = reference_sparse_rows(mask, kept, x.shape[-1]).double()
    exact = x.double() @ dense.T
    size = (x.double().abs() @ dense.abs().T).norm()
    return float((sparse_linear(x, mask, kept, starts).double() - exact).norm() / size.clamp(min=1e-300))


@pytest.fixture(params=[level for level in LEVELS if level != "reference"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    there = native()
    if there is None or LEVELS.index(request.param) > LEVELS.index(there.level):
        pytest.skip(f"no {request.param} kernels here")
    monkeypatch.setattr(sparse, "native", lambda: Native(there.module, request.param))
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_over_widths_and_densities(level: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for m, keep in itertools.product(WIDTHS, KEEPS):
        mask, count = masked(5, m, keep, draw)
        values = torch.randn(count, generator=draw).to(dtype)
        assert torch.equal(sparse_rows(mask, values, m), reference_sparse_rows(mask, values, m)), (m, keep)
        for rows in (1, 2, 3, 7, 18):
            x = torch.randn(rows, m, generator=draw) * torch.randn(1, m, generator=draw).exp()
            assert apart(x, mask, values) < NEAR, (m, keep, rows)
            low = x.bfloat16()
            assert apart(low, mask, values) < NEAR_BF16, (m, keep, rows)


def test_products_of_bf16_are_added_in_fp32(level: str) -> None:
    """512 products of 1 + 2^-7 with themselves and one of 2^-6: a sum in bf16 would lose most of them."""
    x = torch.full((3, 513), 1 + 2.0**-7).bfloat16()
    x[:, 512] = 2.0**-6
    mask, values = pack(torch.ones(2, 513, dtype=torch.uint8), 1), x[:2].clone()
    exact = (512 * (1 + 2.0**-7) ** 2 + 2.0**-12) * torch.ones(3, 2)
    assert torch.equal(sparse_linear(x, mask, values), exact.bfloat16())
    torch.testing.assert_close(sparse_linear(x.float(), mask, values), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_equal_for_codes(level: str, bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    for m, group, half, symmetric in itertools.product((9, 65, 300), (None, 16, 50, 64), (False, True), (False, True)):
        if half and bits == 8:
            continue
        grid = Grid(bits, group, symmetric, zeros="half" if half else "whole")
        # in one line for all rows, which then begin anywhere
        mask, count = masked(7, m, 0.4, draw)
        line = coded(1, count, grid, draw)
        # and as many in each row
        even = pack((torch.rand(7, m, generator=draw).argsort(1) < m // 2).to(torch.uint8), 1)
        matrix = coded(7, m // 2, grid, draw)
        for bit, kept in ((mask, line), (even, matrix)):
            assert torch.equal(sparse_rows(bit, kept, m), reference_sparse_rows(bit, kept, m)), (m, group, half, symmetric)
            for rows in (1, 3, 20):
                x = torch.randn(rows, m, generator=draw)
                assert apart(x, bit, kept) < NEAR, (m, group, half, symmetric, rows)
                assert apart(x.bfloat16(), bit, kept) < NEAR_BF16, (m, group, half, symmetric, rows)


def test_equal_for_many_rows_and_outputs(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for n, m in ((1, 96), (2, 33), (33, 130), (70, 64)):
        mask, count = masked(n, m, 0.3, draw)
        values = torch.randn(count, generator=draw).bfloat16()
        for rows in (*range(1, 30), 64, 127, 513):
            x = torch.randn(rows, m, generator=draw)
            assert apart(x, mask, values) < NEAR, (n, m, rows)
            assert apart(x.bfloat16(), mask, values) < NEAR_BF16, (n, m, rows)


def test_two_of_four() -> None:
    """By hand: of each four the mask keeps two, each row as many."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 1]])
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, -8.0]]).bfloat16()
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 1.0, 10.0, 100.0, 1000.0]])
    bits = pack(mask.to(torch.uint8), 1)
    assert bits.tolist() == [[0b01100011], [0b10011100]]
    assert row_starts(bits, 8).tolist() == [0, 4, 8]
    assert sparse_linear(x, bits, values).tolist() == [[1 + 20 + 30 + 400, 500 + 6000 + 7 - 8000]]
    assert sparse_rows(bits, values, 8, torch.tensor([1])).tolist() == [[0, 0, 5, 6, 7, 0, 0, -8]]


def test_shapes_strides_and_dtypes(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    mask, count = masked(6, 96, 0.3, draw)
    values, x = torch.randn(count, generator=draw).bfloat16(), torch.randn(3, 5, 2, 96, generator=draw)
    y = sparse_linear(x, mask, values)
    assert y.shape == (3, 5, 2, 6)
    across = x.transpose(0, 2)
    assert not across.is_contiguous()
    torch.testing.assert_close(sparse_linear(across, mask, values), y.transpose(0, 2), rtol=1e-5, atol=1e-5)
    wide = torch.stack([mask, mask], 2).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    assert torch.equal(sparse_linear(x, wide, torch.stack([values, values], 1)[:, 0]), y)
    for dtype in (torch.bfloat16, torch.float16):
        low = sparse_linear(x.to(dtype), mask, values)
        assert low.dtype == dtype
        torch.testing.assert_close(low, reference_sparse_linear(x.to(dtype), mask, values), rtol=1e-2, atol=1e-3)
    assert sparse_linear(x[:0], mask, values).shape == (0, 5, 2, 6)
    # bits behind the last column say nothing
    odd, count = masked(6, 90, 0.3, draw)
    odd[:, -1] |= 0b11111100
    kept = torch.randn(count, generator=draw).bfloat16()
    assert apart(x[0, 0, :, :90], odd, kept) < NEAR
    assert apart(x[0, 0, :, :90].bfloat16(), odd, kept) < NEAR_BF16


def test_rows_are_chosen_as_torch_chooses(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    mask, count = masked(9, 70, 0.3, draw)
    values = torch.randn(count, generator=draw).bfloat16()
    dense, starts = reference_sparse_rows(mask, values, 70), row_starts(mask, 70)
    for index in (slice(None), slice(2, 7), slice(8, None), slice(0, 0), torch.tensor([8, -1, 0, 0]), torch.arange(9) % 2 == 0):
        assert torch.equal(sparse_rows(mask, values, 70, index, starts), dense[index])
    with pytest.raises(IndexError):
        sparse_rows(mask, values, 70, torch.tensor([9]), starts)


def test_extreme_values(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    mask, count = masked(4, 256, 0.3, draw)
    values = torch.randn(count, generator=draw).bfloat16()
    base = torch.randn(2, 256, generator=draw)
    for factor in (1e30, 1e-20, 1.0):
        assert apart(base * factor, mask, values) < NEAR, factor
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 2, 30):
            assert torch.equal(sparse_linear(torch.zeros(rows, 256, dtype=dtype), mask, values), torch.zeros(rows, 4, dtype=dtype))
            for bad in (float("nan"), float("inf"), -float("inf")):
                x = base[:1].repeat(rows, 1).to(dtype)
                x[-1, 200] = bad
                # a weight that is not there is a zero, and zero times infinity is no number
                torch.testing.assert_close(
                    sparse_linear(x, mask, values), reference_sparse_linear(x, mask, values), equal_nan=True, rtol=1e-2, atol=1e-2
                )
                odd = values.clone()
                odd[-1] = bad
                torch.testing.assert_close(
                    sparse_linear(x, mask, odd), reference_sparse_linear(x, mask, odd), equal_nan=True, rtol=1e-2, atol=1e-2
                )


def test_whatever_the_threads(level: str) -> None:
    draw, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    for n, rows, dtype in itertools.product((3, 40, 200), (1, 4, 20, 100), (torch.float32, torch.bfloat16)):
        # where torch makes the product, its sums are its own matter
        if rows > sparse.ROWS.get(level, rows):
            continue
        mask, count = masked(n, 256, 0.3, draw)
        values, x = torch.randn(count, generator=draw).bfloat16(), torch.randn(rows, 256, generator=draw).to(dtype)
        y = sparse_linear(x, mask, values)
        try:
            torch.set_num_threads(3 if before == 1 else 1)
            assert torch.equal(sparse_linear(x, mask, values), y)
        finally:
            torch.set_num_threads(before)


def test_differentiable_in_x_and_known_to_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    mask, count = masked(6, 96, 0.3, draw)
    grid = Grid(4, 32)
    x = torch.randn(3, 96, generator=draw, requires_grad=True)
    for kept in (torch.randn(count, generator=draw).bfloat16(), coded(1, count, grid, draw)):
        x.grad = None
        sparse_linear(x, mask, kept).sum().backward()
        torch.testing.assert_close(x.grad, reference_sparse_rows(mask, kept, 96).sum(0).expand(3, 96))
        words = [kept] if isinstance(kept, torch.Tensor) else [kept.codes, kept.scales, kept.zeros, 4, 32, False, count]
        starts, fixed, ops = row_starts(mask, 96), x.detach(), torch.ops.laconic
        index = torch.tensor([4, 0])
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.sparse_linear.default, (fixed, mask, starts, *words), test_utils=tests)
        torch.library.opcheck(ops.sparse_rows.default, (index, 96, mask, starts, *words), test_utils=tests)
        right = reference_sparse_linear(fixed, mask, kept)
        torch.testing.assert_close(ops.sparse_linear(fixed, mask, starts, *words), right, rtol=1e-4, atol=1e-4)
        assert torch.equal(ops.sparse_rows(index, 96, mask, starts, *words), reference_sparse_rows(mask, kept, 96, index))


def test_wrong_input_is_named(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    mask, count = masked(6, 96, 0.3, draw)
    values, x, starts = torch.randn(count, generator=draw).bfloat16(), torch.randn(2, 96, generator=draw), row_starts(mask, 96)
    with pytest.raises(ValueError, match=r"mask has shape \(6, 12\); rows of 100 bits need \(n, 13\)"):
        sparse_linear(torch.randn(2, 100), mask, values)
    with pytest.raises(TypeError, match=r"mask is torch\.int64"):
        sparse_linear(x, mask.long(), values)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        sparse_linear(x.double(), mask, values)
    with pytest.raises(TypeError, match=r"kept weights are torch\.float64"):
        sparse_linear(x, mask, values.double())
    with pytest.raises(TypeError, match=r"starts are torch\.int32"):
        sparse_linear(x, mask, values, starts.int())
    with pytest.raises(ValueError, match=r"starts have shape \(6,\); 6 rows need \(7,\)"):
        sparse_linear(x, mask, values, starts[1:])
    with pytest.raises(ValueError, match=f"{count - 1} weights are held"):
        sparse_linear(x, mask, values[1:])
    with pytest.raises(ValueError, match=f"{count - 1} weights are held"):
        sparse_rows(mask, values[1:], 96)
    with pytest.raises(ValueError, match=f"{count} weights are held"):
        sparse_linear(x, mask, values, torch.tensor([0, 97, 98, 99, 100, 101, count]))
    with pytest.raises(ValueError, match="codes have 3 rows; a mask of 6 rows"):
        sparse_linear(x, mask, coded(3, 32, Grid(4, 32), draw))
    with pytest.raises(ValueError, match="weights are held"):
        reference_sparse_linear(x, mask, values[1:])


def forms(draw: torch.Generator) -> list[Sparse]:
    """The form with what it may hold."""
    weight = torch.randn(12, 80, generator=draw)
    uneven, even = torch.rand(12, 80, generator=draw) < 0.3, torch.rand(12, 80, generator=draw).argsort(1) < 24
    grid, found = Grid(4, 32, scales="log8"), []
    for mask in (uneven, even):
        kept = Sparse.gather(weight, mask)
        codes = torch.randint(0, 16, kept.shape, generator=draw, dtype=torch.uint8)
        scale = torch.rand(kept.shape[0], grid.count(kept.shape[1]), generator=draw) + 0.5
        on_grid = Grouped.of(tuple(kept.shape), grid, codes, scale, scale * 0 + 7)
        values: list[Packed] = [Dense(kept.bfloat16()), Dense(kept.half()), Dense(kept), Dense(kept.double()), on_grid]
        values.append(Sum(Dense(kept.bfloat16()), Dense(kept * 0.01)))
        found += [Sparse.of((12, 80), mask, one) for one in values]
    return found


def test_forms_compute_what_they_hold(level: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for form in forms(draw):
        again = restore(form.describe(), form.tensors())
        where = sparse.unpacked(form.mask, 80)
        right = torch.zeros(12, 80).masked_scatter(where, form.values.dense())
        for one in (form, again):
            assert torch.equal(one.dense(), right)
            assert torch.equal(one.rows(torch.tensor([3, 11])), right[[3, 11]])
            for rows in (1, 40):
                x = torch.randn(rows, 80, generator=draw)
                torch.testing.assert_close(one.matmul(x), x @ right.T, rtol=1e-5, atol=1e-5)
        assert set(form.tensors()) == {"mask", *(f"values.{name}" for name in form.values.tensors())}


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
levels = ["plain", "avx2", "avx512"]
levels = levels[: levels.index(module.best()) + 1]
def narrowed(x):
    return (x.view(np.uint32) >> 16).astype(np.uint16)
for turn in range(int(sys.argv[3])):
    n, m, rows = (int(draw.integers(1, top)) for top in (70, 400, 40))
    mask = np.packbits(draw.random((n, m)) < draw.choice([0.0, 0.1, 0.3, 0.6, 1.0]), axis=1, bitorder="little")
    starts = np.zeros(n + 1, np.int64)
    module.sparse_starts(mask.ctypes.data, mask.shape[1], n, m, starts.ctypes.data)
    assert (np.diff(starts) == np.unpackbits(mask, axis=1, bitorder="little").sum(1)).all()
    total, kind = int(starts[n]), int(draw.integers(4))
    if kind < 3:
        values = draw.standard_normal(total, dtype=np.float32)
        values = values if kind == 0 else narrowed(values) if kind == 1 else values.astype(np.float16)
        told = [values.ctypes.data, kind, total]
    else:
        bits = int(draw.integers(1, 9))
        group = int(draw.choice([0, 16, 64, int(draw.integers(1, 300))]))
        half = bits < 8 and bool(draw.integers(2))
        g = (1 if group == 0 or group > total else -(-total // group)) if total else 0
        codes = draw.integers(0, 256, (1, -(-total * bits // 8)), dtype=np.uint8)
        scales = narrowed(draw.random((1, g), dtype=np.float32))
        zeros = draw.integers(0, 256, (1, -(-g * (bits + half) // 8)), dtype=np.uint8)
        told = [codes.ctypes.data, codes.shape[1], scales.ctypes.data, zeros.ctypes.data, zeros.shape[1], 1, total, bits, group, half]
    # a mask that was changed behind the back of what is held may give any result, and reads nothing that is not there
    spoilt = draw.integers(4) == 0
    if spoilt:
        mask[:] = draw.integers(0, 256, mask.shape, dtype=np.uint8)
    x = draw.standard_normal((rows, m), dtype=np.float32)
    bf16 = bool(draw.integers(2))
    given = narrowed(x) if bf16 else x
    index = draw.integers(0, n, 5)
    found = []
    for level in levels:
        out, dense = np.zeros((rows, n), np.uint16 if bf16 else np.float32), np.full((5, m), np.nan, np.float32)
        stored = (mask.ctypes.data, mask.shape[1], starts.ctypes.data, n, m, told)
        assert module.sparse_linear(given.ctypes.data, bf16, rows, *stored, out.ctypes.data, bf16, 2, level)
        assert module.sparse_rows(*stored, index.ctypes.data, 0, 5, dense.ctypes.data, 2, level)
        places = int(draw.integers(1, 150))
        image, made = draw.standard_normal((2, m, places), dtype=np.float32), np.full((2, n, places), np.nan, np.float32)
        done = module.sparse_pixels(image.ctypes.data, 2, places, *stored, made.ctypes.data, 2)
        assert np.isfinite(made).all() if done else spoilt
        found.append(((out.astype(np.uint32) << 16).view(np.float32) if bf16 else out, dense))
    for out, dense in found[1:]:
        if spoilt:
            continue
        assert (dense == found[0][1]).all(), (n, m, kind)
        size = np.linalg.norm(x, axis=1)[:, None] * (max(1.0, 2.0**bits if kind == 3 else 4.0) * m**0.5) + 1e-9
        assert (np.abs(out - found[0][0]) < (1e-2 if bf16 else 1e-5) * size).all(), (n, m, rows, kind, bf16)
    wrong = starts.copy()
    wrong[n] += 1
    stored = (mask.ctypes.data, mask.shape[1], wrong.ctypes.data, n, m, told)
    assert not module.sparse_linear(given.ctypes.data, bf16, rows, *stored, out.ctypes.data, bf16, 2, level)
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "n", "m", "sides"), [(1, 1, 1, (1, 1)), (2, 33, 40, (5, 13)), (3, 7, 65, (64,)), (1, 130, 31, (9, 9)), (2, 5, 64, (1, 1))]
)
def test_pixels(dtype: torch.dtype, b: int, n: int, m: int, sides: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(n + m)
    x = torch.randn(b, m, *sides, generator=draw).to(dtype)
    for keep in KEEPS:
        mask, count = masked(n, m, keep, draw)
        for kept in (torch.randn(count, generator=draw), torch.randn(count, generator=draw).bfloat16()):
            weight = reference_sparse_rows(mask, kept, m)
            right = torch.einsum("nm,bm...->bn...", weight.double(), x.double())
            found = sparse_pixels(x, mask, kept)
            assert found.dtype == dtype and found.shape == (b, n, *sides)
            near = NEAR if dtype == torch.float32 else 2.0**-7
            assert float((found.double() - right).norm()) <= near * float(right.norm() + 1e-30)
    grid = Grid(4, 16)
    mask = pack(torch.ones(n, m, dtype=torch.uint8), 1)
    codes = coded(n, m, grid, draw)
    right = torch.einsum("nm,bm...->bn...", reference_sparse_rows(mask, codes, m).double(), x.double())
    near = NEAR if dtype == torch.float32 else 2.0**-6
    assert float((sparse_pixels(x, mask, codes).double() - right).norm()) <= near * float(right.norm() + 1e-30)


def test_pixels_that_do_not_fit() -> None:
    mask, count = masked(4, 8, 0.5, torch.Generator().manual_seed(0))
    x = torch.randn(1, 8, 3, 3)
    with pytest.raises(ValueError, match="mask"):
        sparse_pixels(x[:, :5], mask[:, :0], torch.ones(count))
    with pytest.raises(ValueError, match="weights are held"):
        sparse_pixels(x, mask, torch.ones(count + 1))
    with pytest.raises(TypeError, match="float64"):
        sparse_pixels(x.double(), mask, torch.ones(count))
    wrong = row_starts(mask, 8).clone()
    wrong[1:-1] = wrong[-1]
    if not torch.equal(wrong, row_starts(mask, 8)):
        with pytest.raises(ValueError, match="other rows"):
            sparse_pixels(x, mask, torch.ones(count), wrong)


def test_a_convolution_of_one_pixel_is_held_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, 1, 1, generator=draw) * (torch.rand(24, 32, 1, 1, generator=draw) < 0.2)
    conv = torch.nn.Conv2d(32, 24, 1, stride=2).requires_grad_(False)
    conv.weight.data = weight
    there = weight.reshape(24, 32) != 0
    form = Sparse.of((24, 32, 1, 1), there, Dense(Sparse.gather(weight.reshape(24, 32), there)))
    calls = []
    monkeypatch.setattr(Sparse, "dense", lambda self: calls.append(1))
    x = torch.randn(2, 32, 9, 9, generator=draw)
    torch.testing.assert_close(Held(form, conv, conv.bias)(x), conv(x))
    assert not calls
