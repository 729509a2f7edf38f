"""Attention by blocks against dense attention under the mask that the blocks make, and the smallest sets that reach a share."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from laconic.kernels.blocks import block_attention, reaching, visible


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


def test_what_sees_nothing_gives_zeros_and_wrong_shapes_are_named() -> None:
    one = torch.ones(1, 1, 8, 4)
    keep = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert not bool(block_attention(one, one, one, keep, 4).any())
    keep[0, 0, 1, 0] = True
    assert block_attention(one, one, one, keep, 4)[0, 0].sum(1).tolist() == [0.0] * 4 + [4.0] * 4
    for wrong in ((one, one, one, keep, 3), (one, one[:, :, :4], one[:, :, :4], keep, 4), (one, one, one[:, :, :4], keep, 4)):
        with pytest.raises(ValueError, match="does not fit"):
            block_attention(*wrong)
