"""The native products with vector codebooks against torch's own operations in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laconic.kernels import books
from laconic.kernels.bits import pack
from laconic.kernels.books import book_dense, book_linear, reference_book_dense, reference_book_linear
from laconic.kernels.linear import panels
from laconic.kernels.native import LEVELS, Native, native
from laconic.kernels.vectors import Vectors

# errors as a share of |x| |w|: of sums in fp32; half of bf16's last place for a result, and as much again where weights are rounded to it
FP32, BF16 = 1e-6, 2.0**-8

Stored = tuple[list[Tensor], list[Tensor], Tensor | None, Vectors, int]


def held(n: int, m: int, vectors: Vectors) -> Stored:
    draw = torch.Generator().manual_seed(n + m)
    codes = [pack(torch.randint(0, 2**bits, (vectors.runs(n), m), generator=draw), bits) for bits in vectors.bits]
    tables = [torch.randn(2**bits, vectors.width, generator=draw).bfloat16() for bits in vectors.bits]
    return codes, tables, (torch.rand(n, generator=draw) + 0.5).bfloat16() if vectors.scaled else None, vectors, n


def wrong(x: Tensor, stored: Stored) -> float:
    """Greatest error as a share of |x| times what the entries come to without their signs: two that cancel may be multiplied one by one."""
    codes, tables, *rest = stored
    dense = reference_book_dense(*stored, x.shape[-1]).double()
    size = x.double().norm(dim=-1, keepdim=True) * reference_book_dense(codes, [t.abs() for t in tables], *rest, x.shape[-1]).double().norm(
        dim=-1
    )
    return float(((book_linear(x, *stored).double() - x.double() @ dense.T).abs() / size.clamp(min=1e-30)).max())


@pytest.fixture(params=["plain", "avx512"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    there = native()
    if there is None or LEVELS.index(request.param) > LEVELS.index(there.level):
        pytest.skip(f"no native kernels for {request.param} here")
    monkeypatch.setattr(books, "native", lambda: Native(there.module, request.param))
    return str(request.param)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 12, 16, 21])
def test_every_width_of_vectors_and_of_indices(level: str, width: int) -> None:
    shapes = itertools.cycle(itertools.product((1, 8, 33, 70), (1, 5, 64, 131)))
    for index, residual, scaled in itertools.product((1, 5, 8, 11, 12, 16), (0, 4, 13), (False, True)):
        (n, m), vectors = next(shapes), Vectors(width, index, residual, scaled)
        stored = held(n, m, vectors)
        assert torch.equal(book_dense(*stored, m), reference_book_dense(*stored, m)), (n, m, vectors)
        for rows in (1, 4, 7, 20):
            x = torch.randn(rows, m, generator=torch.Generator().manual_seed(rows))
            assert wrong(x, stored) < FP32, (n, m, vectors, rows)
            assert wrong(x.bfloat16(), stored) < 2 * BF16, (n, m, vectors, rows)


def test_many_rows_of_bf16_by_panels() -> None:
    there = native()
    if there is None or not panels(there.level):
        pytest.skip("this processor has no such products, or torch is quicker")
    shapes = (64, 256, 9, 0, False), (33, 31, 40, 0, True), (200, 3001, 25, 8, True), (7, 5, 13, 5, False)
    for width, (n, m, rows, residual, scaled) in itertools.product((4, 8), shapes):
        stored = held(n, m, Vectors(width, 9, residual, scaled))
        x = torch.randn(rows, m, generator=torch.Generator().manual_seed(0)).bfloat16()
        dense = reference_book_dense(*stored, m).bfloat16().double()
        exact, found = x.double() @ dense.T, book_linear(x, *stored).double()
        size = torch.maximum(exact.abs(), 1e-3 * x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=-1))
        assert float(((found - exact).abs() / size).max()) < BF16, (n, m, rows)


def test_shapes_strides_dtypes_threads_and_what_is_not_finite(level: str) -> None:
    stored, x = held(20, 96, Vectors(8, 7)), torch.randn(3, 5, 2, 96, generator=torch.Generator().manual_seed(0))
    y = book_linear(x, *stored)
    assert y.shape == (3, 5, 2, 20)
    torch.testing.assert_close(book_linear(x.transpose(0, 2), *stored), y.transpose(0, 2), rtol=0, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        low = book_linear(x[0, 0].to(dtype), *stored)
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), y[0, 0], rtol=2e-2, atol=0.2)
    assert book_linear(x[:0], *stored).shape == (0, 5, 2, 20)
    few, before = book_linear(x[0, 0], *stored), torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before == 1 else 1)
        assert torch.equal(book_linear(x[0, 0], *stored), few)
    finally:
        torch.set_num_threads(before)
    odd = x[0, 0].clone()
    odd[1, 95] = float("nan")
    found = book_linear(odd, *stored)
    assert found[1].isnan().all() and torch.equal(found[0], few[0])


def test_known_to_torch_and_differentiable_in_x() -> None:
    codes, tables, scales, vectors, n = stored = held(20, 96, Vectors(4, 7, 3, True))
    x = torch.randn(3, 96, requires_grad=True)
    book_linear(x, *stored).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, reference_book_dense(*stored, 96).sum(0).expand(3, 96))
    words = codes, tables, scales, n, vectors.width, vectors.index, vectors.residual
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.laconic.book_linear.default, (x.detach(), *words), test_utils=tests)
    torch.library.opcheck(torch.ops.laconic.book_dense.default, (*words, 96), test_utils=tests)
    torch.testing.assert_close(torch.ops.laconic.book_linear(x.detach(), *words), reference_book_linear(x.detach(), *stored))


def test_wrong_input_is_named() -> None:
    codes, tables, scales, vectors, n = stored = held(20, 96, Vectors(8, 7, 0, True))
    x = torch.randn(2, 96)
    for given, error, said in (
        ((torch.randn(2, 120), *stored), ValueError, "codes have shape"),
        ((x, codes, [tables[0][:, :4]], scales, vectors, n), ValueError, "tables have shape"),
        ((x, codes, tables, scales[:3], vectors, n), ValueError, "scales have shape"),  # type: ignore[index]
        ((x, codes * 2, tables, scales, vectors, n), ValueError, "there are 2 codes"),
        ((x, codes, [tables[0].float()], scales, vectors, n), TypeError, r"tables are torch\.float32"),
        ((x.double(), *stored), TypeError, r"x is torch\.float64"),
    ):
        with pytest.raises(error, match=said):
            book_linear(*given)  # type: ignore[arg-type]


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
def narrow(x): return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
def widen(x): return (x.astype(np.uint32) << 16).view(np.float32)
for turn in range(int(sys.argv[3])):
    n, m, rows, width = (int(draw.integers(1, top)) for top in (90, 700, 30, 20))
    width = int(draw.choice([4, 8, 16, width]))
    bits = [int(b) for b in draw.integers(1, 17, int(draw.integers(1, 3)))]
    runs = -(-n // width)
    codes = [draw.integers(0, 256, (runs, -(-m * b // 8)), dtype=np.uint8) for b in bits]
    tables = [narrow(draw.standard_normal((2**b, width), dtype=np.float32)) for b in bits]
    scales = narrow(draw.random(n, dtype=np.float32)) if draw.integers(2) else None
    told = [k for c, b, t in zip(codes, bits, tables) for k in (c.ctypes.data, c.shape[1], b, t.ctypes.data)]
    x = draw.standard_normal((rows, m), dtype=np.float32)
    bf16 = bool(draw.integers(2))
    given = narrow(x) if bf16 else x
    x = widen(given) if bf16 else x
    at = 0 if scales is None else scales.ctypes.data
    dense = np.full((n, m), np.nan, np.float32)
    module.vector_dense(told, at, n, m, width, dense.ctypes.data, 2)
    plain = [np.unpackbits(c, axis=1, bitorder="little")[:, : m * b].reshape(runs, m, b) @ (1 << np.arange(b)) for c, b in zip(codes, bits)]
    made = [widen(t)[p].transpose(0, 2, 1).reshape(-1, m)[:n] for t, p in zip(tables, plain)]
    right = sum(made[1:], made[0]) * (1 if scales is None else widen(scales)[:, None])
    assert (dense == right).all(), (n, m, width, bits)
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(sum(map(np.abs, made)), axis=1) + 1e-9
    ways = [(level, False) for level in ("plain", "avx512")[: 1 + (module.best() == "avx512")]]
    if bf16 and width in (4, 8) and module.pairs():
        ways.append(("avx512", True))
    for level, panels in ways:
        out = np.full((rows, n), 65535 if bf16 else np.nan, np.uint16 if bf16 else np.float32)
        module.vector_linear(given.ctypes.data, bf16, rows, told, at, n, m, width, out.ctypes.data, panels, 2, level)
        out = widen(out) if bf16 else out
        least = 1e-5 * size + (np.abs(out) * 2.0**-7 + (2.0**-8 * size if panels else 0) if bf16 else 0)
        assert (np.abs(out - x @ dense.T) < least).all(), (n, m, rows, width, bits, bf16, level, panels)
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 200)
