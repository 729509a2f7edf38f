"""Products that leave out what is multiplied with zero, against torch in fp64, and that they read no more than they need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laconic.kernels import skipping
from laconic.kernels.skipping import lined, reference_skipped, skipped

NEAR = 1e-6


@pytest.fixture(params=["native", "reference"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(skipping, "native", lambda: None)
    elif skipping.native() is None:
        pytest.skip("the native kernels were not built here")
    return str(request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wanted(a: Tensor, down: Tensor, x: Tensor | None, up: Tensor | None, bias: Tensor | None) -> Tensor:
    factor = a.double()
    if x is not None and up is not None:
        factor = factor * (x.double() @ up.double().T + (0 if bias is None else bias.double()))
    return factor @ down.double().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 7, 5, 3), (3, 33, 31, 65), (2, 5, 1, 200), (1, 700, 130, 257), (513, 9, 17, 4), (0, 4, 4, 4)]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sums_of_the_rows_that_are_needed(by: str, dtype: torch.dtype, shape: tuple[int, ...], share: float) -> None:
    t, h, m, n = shape
    a = drawn(t, h) * (torch.rand(t, h, generator=torch.Generator().manual_seed(1)) < share)
    x, up, down, bias = drawn(t, m, seed=2), drawn(h, m, seed=3).to(dtype), lined(drawn(n, h, seed=4).to(dtype)), drawn(h, seed=5)
    for more in ((None, None, None), (x, up, None), (x, up, bias)):
        found, right = skipped(a, down, *more), wanted(a, down, *more)
        assert found.shape == (t, n) and found.dtype == torch.float32
        assert float((found - right).norm()) <= NEAR * float(right.norm())


def test_what_is_not_asked_for_is_not_read(by: str) -> None:
    a, x, up, down = drawn(2, 40), drawn(2, 8, seed=1), drawn(40, 8, seed=2), lined(drawn(6, 40, seed=3))
    a[:, 5:35] = 0
    right = reference_skipped(a, down, x, up)
    up[5:35], down[:, 5:35] = torch.nan, torch.inf
    torch.testing.assert_close(skipped(a, down, x, up), right)


def test_extremes(by: str) -> None:
    down, up = lined(torch.ones(3, 4)), torch.ones(4, 2)
    for value in (torch.nan, torch.inf, 3e38):
        a = torch.tensor([[0.0, value, 0.0, 1.0]])
        torch.testing.assert_close(skipped(a, down), wanted(a, down, None, None, None).float(), equal_nan=True)
        # a product above what fp32 holds is infinite
        assert not bool(torch.isfinite(skipped(a, down, torch.full((1, 2), 2.0), up)).any())
    assert skipped(torch.zeros(1, 4), down, torch.full((1, 2), torch.nan), up).tolist() == [[0.0] * 3]


def test_any_layout_and_other_dtypes(by: str) -> None:
    a, x, up, down = drawn(4, 24)[::2], drawn(2, 16, seed=1)[:, ::2], drawn(8, 24, seed=2).T, drawn(6, 24, seed=3)
    right = wanted(a, down, x, up, None)
    assert lined(down).t().is_contiguous() and lined(lined(down)).data_ptr() != down.data_ptr()
    for matrix in (down, lined(down), down.half(), down.bfloat16()):
        assert float((skipped(a, matrix, x, up) - right).norm()) < 1e-2 * float(right.norm())
    torch.testing.assert_close(
        skipped(a.bfloat16(), lined(down)), wanted(a.bfloat16(), down, None, None, None).float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("shapes", "word"),
    [
        (((1, 4), (3, 5), None, None, None), "down"),
        (((1, 4), (3, 4), (1, 2), None, None), "down"),
        (((1, 4), (3, 4), (2, 2), (4, 2), None), "x"),
        (((1, 4), (3, 4), (1, 2), (4, 3), None), "up"),
        (((1, 4), (3, 4), (1, 2), (4, 2), (3,)), "bias"),
        (((1, 4), (3, 4), None, None, (4,)), "bias"),
    ],
)
def test_wrong_shapes_are_named(by: str, shapes: tuple[tuple[int, ...] | None, ...], word: str) -> None:
    given = [None if shape is None else torch.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match=word):
        skipped(*given)


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
normal = lambda *shape: draw.standard_normal(shape, dtype=np.float32)
for turn in range(int(sys.argv[3])):
    t, h, m, n = (int(draw.integers(1, top)) for top in (4, 400, 300, 300))
    narrow, gates, biased = (bool(draw.integers(2)) for _ in range(3))
    a = (normal(t, h) * (draw.random((t, h), dtype=np.float32) < draw.random())).astype(np.float32)
    x, bias, out = normal(t, m), normal(h), np.full((t, n), np.nan, np.float32)
    up, down = normal(h, m), normal(h, n)
    if narrow:
        up, down = ((one.view(np.uint32) >> 16).astype(np.uint16) for one in (up, down))
    other = [x.ctypes.data, up.ctypes.data, bias.ctypes.data if biased else 0] if gates else [0, 0, 0]
    module.skip(a.ctypes.data, *other, down.ctypes.data, narrow, t, m, h, n, out.ctypes.data, int(draw.integers(1, 4)))
    assert np.isfinite(out).all()
    least, stream, to = np.abs(normal(h)), normal(t, m), np.full((t, n), np.nan, np.float32)
    tape = module.Tape("plain", bool(draw.integers(2)), 1)
    gated = [1, m, up.ctypes.data] if gates else [-1, 0, 0]
    tape.skip(0, 2, h, least.ctypes.data, h, down.ctypes.data, narrow, n, *gated, t)
    tape.hold([one.ctypes.data for one in (a, stream, to)])
    assert tape.run(0, 1, t, 1, 0, 2) == 1 and np.isfinite(to).all()
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 200)
