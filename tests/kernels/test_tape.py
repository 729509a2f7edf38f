"""Steps of a tape, each against torch's own operations, and all of them under sanitizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.kernels.attention import attention
from laconic.kernels.native import LEVELS, native

pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")
PAGE = 256


@pytest.fixture(params=["plain", "avx512"])
def tape(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a tape of one layer, of inputs in 32 or 16 bits."""
    there = native()
    assert there is not None
    if LEVELS.index(request.param) > LEVELS.index(there.module.best()):
        pytest.skip(f"this processor has no {request.param}")
    return lambda bf16=False: there.module.Tape(request.param, bf16, 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(made: Any, buffers: list[Tensor], b: int, t: int, past: int = 0, threads: int = 2) -> int:
    made.hold([buffer.data_ptr() for buffer in buffers])
    return int(made.run(0, 1, b, t, past, threads))


@pytest.mark.parametrize(("width", "heads", "rows"), [(1, 1, 1), (17, 3, 5), (64, 1, 2), (2048, 1, 130)])
def test_norms(tape: Callable[..., Any], width: int, heads: int, rows: int) -> None:
    x, times, out = drawn(rows, heads, width), drawn(width, seed=1), torch.full((rows, heads, width), torch.nan)
    made = tape()
    made.norm(0, 1, width, heads, times.data_ptr(), 1e-6)
    assert run(made, [x, out], rows, 1) == 1
    torch.testing.assert_close(out, F.rms_norm(x, (width,), times, 1e-6), rtol=2e-6, atol=1e-6)


def test_gates_to_the_last_bits_and_at_the_ends(tape: Callable[..., Any]) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, -88.0, 88.0, -1e4, 1e4, -3e38, 3e38, 1e-30, torch.nan])])
    up = torch.ones_like(x)
    made = tape()
    made.gate(0, 1, x.numel())
    assert run(made, [x, up], 1, 1) == 1
    wanted = F.silu(x.double()).float()
    torch.testing.assert_close(up, wanted, rtol=5e-7, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("n", "m", "rows"), [(1, 1, 1), (37, 65, 3), (513, 300, 2)])
def test_matrices_as_they_are(tape: Callable[..., Any], bf16: bool, n: int, m: int, rows: int) -> None:
    for narrow in (False, True):
        x, bias, out = drawn(rows, m), drawn(n, seed=2), torch.full((rows, n), torch.nan)
        weight = drawn(n, m, seed=1).to(torch.bfloat16 if narrow else torch.float32)
        made = tape(bf16)
        made.dense(0, 1, weight.data_ptr(), narrow, n, m, bias.data_ptr(), rows)
        assert run(made, [x, out], rows, 1) == 1
        wanted = F.linear((x.bfloat16() if bf16 else x).double(), weight.double(), bias.double()).float()
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-4)
        # one row more is for torch
        assert run(made, [x, out], rows + 1, 1) == 0


def test_heads_are_turned_by_their_place(tape: Callable[..., Any]) -> None:
    b, t, heads, d, past = 2, 3, 5, 6, 4
    x, cosine, sine = drawn(b, t, heads, d), drawn(past + t, d, seed=1), drawn(past + t, d, seed=2)
    half = torch.cat([-x[..., 3:], x[..., :3]], -1)
    wanted = x * cosine[past:, None] + half * sine[past:, None]
    made = tape()
    made.rope(0, d, heads)
    made.turn(cosine.data_ptr(), sine.data_ptr())
    assert run(made, [x], b, t, past) == 1
    torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("b", "t", "past"), [(1, 1, 0), (1, 1, 255), (2, 3, 254), (3, 16, 700), (1, 5, 1)])
def test_attention_over_pages(tape: Callable[..., Any], bf16: bool, b: int, t: int, past: int) -> None:
    h, k, d, dtype = 6, 2, 24, torch.bfloat16 if bf16 else torch.float32
    pages = [[torch.full((b, k, PAGE, d), 7.0, dtype=dtype) for _ in range(-(-(past + t) // PAGE))] for _ in range(2)]
    # what was there before, then t new tokens
    halves = [drawn(b, past + t, k, d, seed=seed).to(dtype).float() for seed in (1, 2)]
    for half, held in zip(halves, pages, strict=True):
        for at in range(past):
            held[at // PAGE][:, :, at % PAGE] = half[:, at].to(dtype)
    query, out = drawn(b, t, h, d), torch.full((b, t, h, d), torch.nan)
    made = tape(bf16)
    made.append(1, 2, d, k, 0)
    made.attend(0, 3, d, h, 0, k, 0.3, t)
    made.page(0, *([page.data_ptr() for page in held] for held in pages))
    buffers = [query, *(half[:, past:].contiguous() for half in halves), out]
    made.hold([buffer.data_ptr() for buffer in buffers])
    assert made.run(0, 2, b, t, past, 2) == 2
    wanted = attention(query.transpose(1, 2), *(half.transpose(1, 2) for half in halves), [past + t] * b, None, 0.3)
    torch.testing.assert_close(out.transpose(1, 2), wanted, rtol=1e-4, atol=1e-4)
    # nothing behind the new tokens was written to
    for held in pages:
        if (past + t) % PAGE:
            assert bool((held[-1][:, :, (past + t) % PAGE :] == 7).all())
    assert made.run(1, 2, b, t + 1, past - 1, 2) == 1


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
normal = lambda *shape: draw.standard_normal(shape, dtype=np.float32)
for turn in range(int(sys.argv[3])):
    b, t, h, k, d, hidden = (int(draw.integers(1, top)) for top in (4, 9, 5, 3, 20, 70))
    h, d, past, bf16, bits = h * k, 2 * d, int(draw.integers(0, 600)), bool(draw.integers(2)), int(draw.integers(1, 9))
    rows, width = b * t, h * d
    group = int(draw.choice([0, 16, 32, 128]))
    g = -(-hidden // (group or hidden))
    codes = draw.integers(0, 256, (width, -(-hidden * bits // 8)), dtype=np.uint8)
    scales = (draw.random((width, g), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    whole = [normal(k * d, hidden), (normal(k * d, hidden).view(np.uint32) >> 16).astype(np.uint16)]
    times, bias = normal(hidden), normal(width)
    angles = [normal(past + t, d), normal(past + t, d)]
    kind = np.uint16 if bf16 else np.float32
    pages = [[np.zeros((b, k, 256, d), kind) for _ in range(-(-(past + t) // 256))] for _ in range(2)]
    x = normal(rows, hidden)
    found = []
    for level in ["plain"] + ["avx512"] * (module.best() == "avx512"):
        tape = module.Tape(level, bf16, 1)
        buffers = [x.copy(), *(np.full((rows, n), np.nan, np.float32) for n in (hidden, width, k * d, k * d, width))]
        tape.hold([a.ctypes.data for a in buffers])
        tape.turn(*(a.ctypes.data for a in angles))
        tape.page(0, *([a.ctypes.data for a in half] for half in pages))
        tape.norm(0, 1, hidden, 1, times.ctypes.data, 1e-5)
        tape.linear(1, 2, codes.ctypes.data, codes.shape[1], scales.ctypes.data, 0, 0, width, hidden, bits, group, False, bias.ctypes.data,
                    bool(draw.integers(2)), 1 << 40)
        tape.dense(1, 3, whole[0].ctypes.data, False, k * d, hidden, 0, 1 << 40)
        tape.dense(1, 4, whole[1].ctypes.data, True, k * d, hidden, 0, 1 << 40)
        tape.rope(2, d, h)
        tape.rope(3, d, k)
        tape.append(3, 4, d, k, 0)
        tape.attend(2, 5, d, h, 0, k, d**-0.5, 16)
        tape.add(5, 2, width)
        tape.gate(5, 2, width)
        assert tape.run(0, 10, b, t, past, 2) == 10
        assert all(np.isfinite(a).all() for a in buffers)
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 150)
