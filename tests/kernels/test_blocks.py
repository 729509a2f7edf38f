"""Attention by blocks against dense attention under the mask that the blocks make, and the smallest sets that reach a share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from laconic.kernels import blocks
from laconic.kernels.blocks import block_attention, causal_attention, reaching, visible


def test_the_smallest_set_that_reaches_a_share() -> None:
    values = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 5.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4])
    assert reaching(values, 0.7).int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert reaching(values, 0.71).int().tolist()[0] == [1, 1, 1, 0]
    assert reaching(values, 1.0).int().tolist() == [[1] * 4, [0, 1, 0, 0], [1, 0, 0, 0], [1] * 4]


def test_blocks_that_may_be_seen() -> None:
    # two queries, tokens 3 and 4 of 5, in blocks of two: the first block of queries spans two blocks of keys
    seen, own = visible(2, 5, 2)
    assert seen.tolist() == [[True, True, True]] and own.tolist() == [[False, True, True]]
    seen, own = visible(4, 4, 2)
    assert seen.tolist() == [[True, False], [True, True]] and own.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "s", "block"), [(64, 64, 16), (70, 70, 16), (33, 100, 16), (1, 1, 4), (5, 9, 1), (50, 50, 64), (48, 64, 16)])
def test_attention_over_blocks_is_dense_attention_under_their_mask(dtype: torch.dtype, t: int, s: int, block: int) -> None:
    draw = torch.Generator().manual_seed(t + s)
    query, key, value = (torch.randn(2, heads, n, d, generator=draw).to(dtype) for heads, n, d in ((6, t, 8), (3, s, 8), (3, s, 12)))
    seen, own = visible(t, s, block)
    keep = (torch.rand(2, 6, *seen.shape, generator=draw) < 0.4) | own
    tokens = keep.repeat_interleave(block, 2)[:, :, :t].repeat_interleave(block, 3)[..., :s] & torch.ones(t, s, dtype=torch.bool).tril(
        s - t
    )
    dense = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), tokens, scale=0.3, enable_gqa=True)
    found = block_attention(query, key, value, keep, block, 0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), dense, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("t", "s", "d", "v"), [(1, 1, 8, 8), (129, 129, 33, 5), (40, 300, 64, 32), (9, 1000, 16, 64), (257, 257, 128, 48), (3, 130, 1, 1)]
)
def test_over_all_blocks_it_is_causal_attention(dtype: torch.dtype, t: int, s: int, d: int, v: int) -> None:
    draw = torch.Generator().manual_seed(t + s)
    query, key, value = (torch.randn(2, heads, n, w, generator=draw).to(dtype) for heads, n, w in ((4, t, d), (2, s, d), (2, s, v)))
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    dense = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask, enable_gqa=True)
    found = causal_attention(query, key, value)
    assert found.dtype == dtype and found.shape == (2, 4, t, v)
    near = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
    torch.testing.assert_close(found.double(), dense, rtol=1e-4, atol=near[dtype])
    # the same for tensors that do not lie in one piece, whatever the threads
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before == 1 else 1)
        again = causal_attention(*apart)
        # few pairs are torch's, whose sums may come in another order
        assert torch.equal(again, found) if t * s >= blocks.PAIRS else torch.allclose(again, found, rtol=1e-2, atol=1e-3)
    finally:
        torch.set_num_threads(before)


def test_loud_and_broken_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 200, 16, generator=draw) for _ in range(3))
    # scores of some thousands, rising and falling, so that the greatest changes from block to block
    loud = query * torch.linspace(1, 300, 200)[:, None]
    mask = torch.ones(200, 200, dtype=torch.bool).tril()
    dense = F.scaled_dot_product_attention(loud.double(), key.double(), value.double(), mask)
    torch.testing.assert_close(causal_attention(loud, key, value).double(), dense, rtol=1e-3, atol=1e-3)
    found = causal_attention(query, key, value)
    for bad in (float("nan"), float("inf")):
        odd = key.clone()
        odd[0, 0, 150, 3] = bad
        seen = causal_attention(query, odd, value)
        assert torch.equal(seen[:, :, :150], found[:, :, :150])
        assert not torch.isfinite(seen[:, :, 150:]).all(-1).all() if bad == float("inf") else seen[:, :, 150:].isnan().all()


def test_what_sees_nothing_gives_zeros_and_wrong_shapes_are_named() -> None:
    one = torch.ones(1, 1, 8, 4)
    keep = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert not bool(block_attention(one, one, one, keep, 4).any())
    keep[0, 0, 1, 0] = True
    assert block_attention(one, one, one, keep, 4)[0, 0].sum(1).tolist() == [0.0] * 4 + [4.0] * 4
    for wrong in ((one, one, one, keep, 3), (one, one[:, :, :4], one[:, :, :4], keep, 4), (one, one, one[:, :, :4], keep, 4)):
        with pytest.raises(ValueError, match="does not fit"):
            block_attention(*wrong)


FUZZ = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
draw = np.random.default_rng(int(sys.argv[2]))
def narrow(x): return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
def widen(x): return (x.astype(np.uint32) << 16).view(np.float32)
for turn in range(int(sys.argv[3])):
    b, k, share, t, past, d, v, block = (int(draw.integers(1, top)) for top in (3, 3, 4, 120, 100, 50, 50, 90))
    past -= 1
    h, s = k * share, t + past
    bf16 = bool(draw.integers(2)) and module.pairs()
    tensors = [draw.standard_normal(shape, dtype=np.float32) for shape in ((b, h, t, d), (b, k, s, d), (b, k, s, v))]
    given = [narrow(x) if bf16 else x for x in tensors]
    query, key, value = [widen(x) if bf16 else x for x in given]
    keep = draw.integers(0, 2, (b, h, -(-t // block), -(-s // block)), dtype=np.uint8)
    out = np.full((b, h, t, v), 65535 if bf16 else np.nan, np.uint16 if bf16 else np.float32)
    places = *(x.ctypes.data for x in given), keep.ctypes.data
    if not module.block_attention(*places, [b, h, k, t, s, d, v], block, bf16, 0.2, out.ctypes.data, 2, module.best()):
        assert module.best() != "avx512"
        continue
    out = widen(out) if bf16 else out
    sees = keep.repeat(block, 2)[:, :, :t].repeat(block, 3)[..., :s].astype(bool) & np.tri(t, s, past, dtype=bool)
    scores = np.where(sees, 0.2 * query @ key.repeat(share, 1).swapaxes(2, 3), -np.inf)
    most = np.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = np.exp(scores - most)
    right = weights @ value.repeat(share, 1) / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    near = 3e-2 if bf16 else 1e-5
    assert (np.abs(out - right) <= near * (1 + np.abs(right))).all(), (b, h, k, t, s, d, v, block, bf16)
"""


@pytest.mark.long
def test_fuzz_with_sanitizers(sanitized: Callable[[str, str, int], None]) -> None:
    sanitized(FUZZ, "0", 200)
