"""The laws of Pattern, run over every one that is found in the tree: what a prompt may not miss, what it may not see, and that what is kept
for a head is its own matter."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from laconic.core.state import Pattern
from laconic.kernels.attention import attention
from laconic.kernels.blocks import block_attention, visible

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)

PATTERNS = [(path, found.instance(cls)) for path, cls in found.classes(Pattern)]
each = pytest.mark.parametrize("pattern", [pattern for _, pattern in PATTERNS], ids=[path for path, _ in PATTERNS])
# queries, of so many tokens
SIZES = [(512, 512), (700, 700), (300, 1000), (1, 5), (129, 130), (40, 300)]


def drawn(t: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(t + s)
    return torch.randn(2, 4, t, 16, generator=draw), torch.randn(2, 2, s, 16, generator=draw), torch.randn(2, 2, s, 24, generator=draw)


def test_every_pattern_is_found():
    assert {"attention.sparse.xattention"} <= {path for path, _ in PATTERNS}


@each
@pytest.mark.parametrize(("t", "s"), SIZES)
def test_own_blocks_stay_and_later_ones_do_not(pattern, t, s):
    query, key, value = drawn(t, s)
    kept = pattern(query, key)
    seen, own = visible(t, s, pattern.block)
    assert kept.dtype == torch.bool and kept.shape == (2, 4, *seen.shape)
    assert bool((kept | ~own).all()) and not bool((kept & ~seen).any())
    # every query then sees something
    assert torch.isfinite(block_attention(query, key, value, kept, pattern.block)).all()


@each
def test_heads_and_rows_are_apart(pattern):
    query, key, _ = drawn(512, 700)
    kept = pattern(query, key)
    for row in range(2):
        for head in range(4):
            one = pattern(query[row : row + 1, head : head + 1], key[row : row + 1, head // 2 : head // 2 + 1])
            assert torch.equal(one[0, 0], kept[row, head])
    assert torch.equal(pattern(query, key), kept)


@each
def test_what_comes_later_is_not_looked_at(pattern):
    query, key, _ = drawn(512, 512)
    kept = pattern(query, key)
    later = key.clone()
    later[:, :, pattern.block :] += 5
    assert torch.equal(pattern(query, later)[:, :, 0], kept[:, :, 0])


@each
def test_numbers_that_are_not_finite_and_equal_scores(pattern):
    query, key, _ = drawn(300, 300)
    for bad in (torch.zeros_like(key), torch.full_like(key, torch.nan), torch.full_like(key, 1e30)):
        kept = pattern(query, bad)
        seen, own = visible(300, 300, pattern.block)
        assert bool((kept | ~own).all()) and not bool((kept & ~seen).any())


@each
def test_all_blocks_are_dense_attention(pattern):
    query, key, value = drawn(300, 1000)
    whole = visible(300, 1000, pattern.block)[0].expand(2, 4, -1, -1)
    dense = attention(query, key, value, [1000] * 2)
    torch.testing.assert_close(block_attention(query, key, value, whole, pattern.block), dense, rtol=1e-5, atol=1e-5)
    if "tau" in {field.name for field in dataclasses.fields(pattern)}:
        assert torch.equal(dataclasses.replace(pattern, tau=1.0)(query, key), whole)
