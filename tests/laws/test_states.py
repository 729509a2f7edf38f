"""The laws of State, run over every one that is found in the tree, with each word that its knobs may be."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from laconic.core.errors import UserError
from laconic.core.state import Ragged

_spec = importlib.util.spec_from_file_location("laws_found", Path(__file__).with_name("found.py"))
found = importlib.util.module_from_spec(_spec)
sys.modules["laws_found"] = found
_spec.loader.exec_module(found)

STATES = found.states()
each = pytest.mark.parametrize("make", [make for _, make in STATES], ids=[name for name, _ in STATES])
# longer than two residuals of the defaults
LONG = 270


def tokens(t: int, b: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (b, 2, t, 6) with one loud channel, values (b, 2, t, 5)."""
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(b, 2, t, 6, generator=g), torch.randn(b, 2, t, 5, generator=g)
    keys[..., 1] += 20
    return keys.to(dtype), values.to(dtype)


def part(new, start, stop, rows=slice(None)):
    return tuple(one[rows, :, start:stop] for one in new)


def all_of(state, layer=0):
    return torch.tensor(state.waiting(layer))


def fill(state, new, *, layer=0, mask=None):
    seen = state.append(layer, new, None, mask)
    state.commit(all_of(state, layer), layer)
    return seen


def filled(make, new, *chunks):
    """A state to which the tokens came in chunks of these lengths, the rest at once."""
    state, at = make(), 0
    for length in (*chunks, new[0].shape[2] - sum(chunks)):
        if length:
            fill(state, part(new, at, at + length))
            at += length
    return state


def same(a, b):
    assert set(a.tensors()) == set(b.tensors())
    for name, one in a.tensors().items():
        assert torch.equal(one, b.tensors()[name]), name
    assert {i: had.count for i, had in a.layers.items()} == {i: had.count for i, had in b.layers.items()}


def row(seen: Ragged, i: int) -> torch.Tensor:
    return seen.data[i, :, : seen.lengths[i]]


def test_every_state_is_found():
    assert {"cache.store.full", "cache.store.kivi", "cache.store.kivi(keys=token)"} <= {name for name, _ in STATES}


@each
def test_tokens_that_were_not_committed_leave_no_trace(make):
    new, junk = tokens(LONG + 40), tokens(60, seed=1)
    state, clean = filled(make, part(new, 0, LONG)), filled(make, part(new, 0, LONG))
    state.append(0, junk, None, None)
    state.commit(torch.tensor([0, 0]))
    same(state, clean)
    # a part of what was staged, in two appends
    state.append(0, tuple(torch.cat([a, b], 2) for a, b in zip(part(new, LONG, LONG + 40), junk, strict=True)), None, None)
    state.append(0, junk, None, None)
    state.commit(torch.tensor([40, 40]))
    fill(clean, part(new, LONG, LONG + 40))
    same(state, clean)
    # and where nothing was there before
    empty = make()
    empty.append(0, junk, None, None)
    empty.commit(torch.tensor([0, 0]))
    assert empty.nbytes == 0
    fill(empty, new)
    same(empty, filled(make, new))


@each
def test_how_tokens_came_leaves_no_trace(make):
    new = tokens(LONG)
    whole = filled(make, new)
    same(filled(make, new, *[1] * LONG), whole)
    same(filled(make, new, 128, 128, 14), whole)
    same(filled(make, new, 3, 200, 31, 1), whole)


@each
def test_what_is_read_of_a_token_stays_where_a_state_says_so(make):
    # over the end of a block of the defaults
    start, stop = 3 * 128 - 10, 3 * 128 + 10
    new = tokens(stop)
    together, alone = (filled(make, part(new, 0, start)) for _ in range(2))
    seen, changed = together.append(0, part(new, start, stop), None, None), False
    for at in range(start, stop):
        for all_at_once, one in zip(seen, fill(alone, part(new, at, at + 1)), strict=True):
            changed |= not torch.equal(all_at_once.data[:, :, : at + 1], one.data)
    assert changed != together.steady


@each
def test_rows_may_commit_unlike_counts(make):
    new, state, at = tokens(LONG + 50, b=3), make(), [0, 0, 0]
    g = torch.Generator().manual_seed(2)
    # lengths drift apart, over the ends of blocks
    for t in (150, 40, 1, 1, 5, 60, 30):
        chunk = tuple(torch.stack([one[i, :, at[i] : at[i] + t] for i in range(3)]) for one in new)
        state.append(0, chunk, None, None)
        count = torch.randint(0, t + 1, (3,), generator=g)
        state.commit(count)
        at = [a + int(n) for a, n in zip(at, count, strict=True)]
    assert state.layers[0].count == tuple(at)
    assert len(set(at)) == 3
    for i in range(3):
        alone = filled(make, part(new, 0, at[i], slice(i, i + 1)))
        for together, one in zip(state.seen(0), alone.seen(0), strict=True):
            assert together.lengths[i] == at[i]
            assert torch.equal(row(together, i), row(one, 0))
        # the row that is picked holds what it held
        picked = state.fork(torch.tensor([i]))
        for together, one in zip(picked.seen(0), alone.seen(0), strict=True):
            assert torch.equal(row(together, 0), row(one, 0))
        assert picked.nbytes == alone.nbytes
    # nothing lies behind the end of a row
    for one in state.seen(0):
        for i in range(3):
            assert not one.data[i, :, one.lengths[i] :].any()


@each
def test_padding_is_not_held(make):
    new = tokens(LONG, b=2)
    mask = torch.ones(2, LONG, dtype=torch.bool)
    mask[1, :77] = False
    poisoned = tuple(torch.where(mask[:, None, :, None], one, 1e6) for one in new)
    state = make()
    fill(state, poisoned, mask=mask)
    for i, start in ((0, 0), (1, 77)):
        alone = filled(make, part(new, start, LONG, slice(i, i + 1)))
        for together, one in zip(state.seen(0), alone.seen(0), strict=True):
            assert torch.equal(row(together, i), row(one, 0))


@each
def test_a_fork_is_independent(make):
    new, more = tokens(LONG, b=3), tokens(200, b=3, seed=4)
    state = filled(make, new)
    state.append(0, part(more, 0, 3), None, None)
    before = {name: one.clone() for name, one in state.tensors().items()}
    twin = state.fork(torch.tensor([2, 0, 0]))
    twin.commit(torch.tensor([3, 3, 1]))
    fill(twin, more)
    same_as_before = state.tensors()
    assert all(torch.equal(one, same_as_before[name]) for name, one in before.items())
    # and the other way round
    after = {name: one.clone() for name, one in twin.tensors().items()}
    state.commit(torch.tensor([3, 3, 3]))
    fill(state, more)
    assert all(torch.equal(one, twin.tensors()[name]) for name, one in after.items())
    # its rows are those that were picked
    clean = filled(make, tuple(one[[2, 0]] for one in new))
    for ours, alone in zip(filled(make, new).fork(torch.tensor([2, 0])).seen(0), clean.seen(0), strict=True):
        assert torch.equal(ours.data, alone.data)


@each
def test_a_mark_comes_back_exactly(make):
    new, more = tokens(LONG), tokens(200, seed=5)
    state = filled(make, new)
    fill(state, part(more, 0, 9), layer=1)
    state.append(0, part(more, 0, 2), None, None)
    before, mark = state.tensors(), state.mark()
    copies = {name: one.clone() for name, one in before.items()}
    for _ in range(2):
        state.commit(torch.tensor([1, 2]))
        fill(state, more)
        fill(state, more, layer=2)
        state.restore(mark)
        assert dict.fromkeys(state.tensors()) == dict.fromkeys(copies)
        assert all(torch.equal(one, copies[name]) for name, one in state.tensors().items())
        assert state.waiting(0) == (2, 2) and state.waiting(1) == (0, 0)


def reachable(value, seen=None):
    """Every tensor that an object leads to, once."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        seen[id(value)] = value
    elif isinstance(value, dict):
        for one in value.values():
            reachable(one, seen)
    elif isinstance(value, list | tuple):
        for one in value:
            reachable(one, seen)
    elif hasattr(value, "__dict__"):
        reachable(vars(value), seen)
    return seen


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_those_held(make, dtype):
    state = make()
    for layer in range(2):
        fill(state, tokens(LONG, dtype=dtype), layer=layer)
    state.append(1, tokens(3, dtype=dtype), None, None)
    held = reachable(state).values()
    assert {id(one) for one in held} == {id(one) for one in state.tensors().values()}
    assert state.nbytes == sum(one.numel() * one.element_size() for one in held)
    # no view keeps a larger tensor alive, none is held twice
    assert state.nbytes == sum(one.untyped_storage().nbytes() for one in held)
    assert len({one.untyped_storage().data_ptr() for one in held}) == len(held)
    numbers = (2 * LONG + 3) * 2 * 2 * (6 + 5)
    assert state.bits_per_number == pytest.approx(8 * state.nbytes / numbers)


@each
def test_what_is_new_is_read_exactly_and_attention_is_over_what_is_read(make):
    new, more = tokens(LONG), tokens(7, seed=6)
    state = make()
    seen = state.append(0, new, None, None)
    assert all(torch.equal(one.data, exact) for one, exact in zip(seen, new, strict=True))
    state.commit(all_of(state))
    keys, values = state.append(0, more, None, None)
    assert torch.equal(keys.data[:, :, LONG:], more[0]) and torch.equal(values.data[:, :, LONG:], more[1])
    query = torch.randn(2, 6, 7, 6)
    allowed = torch.arange(LONG + 7) <= LONG + torch.arange(7)[:, None]
    wide = [one.data.repeat_interleave(3, 1) for one in (keys, values)]
    plain = F.scaled_dot_product_attention(query, *wide, attn_mask=allowed)
    torch.testing.assert_close(state.attend(query, 0, None), plain, rtol=1e-4, atol=1e-5)
    # and in no place where a mask forbids it
    allowed[:, 5] = False
    plain = F.scaled_dot_product_attention(query, *wide, attn_mask=allowed)
    torch.testing.assert_close(state.attend(query, 0, allowed.expand(2, -1, -1)), plain, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_never_gives_nan(make, dtype):
    keys, values = tokens(LONG)
    cases = {
        "zeros": (keys * 0, values * 0),
        "the same number": (torch.full_like(keys, 3.3), torch.full_like(values, -7.7)),
        "tiny": (keys * 1e-7, values * 1e-7),
        "large": (keys * 1e3, values * 1e4),
        "far from zero": (keys + 1e4, values - 1e4),
        "one token": part((keys, values), 0, 1),
    }
    for name, new in cases.items():
        state = make()
        fill(state, tuple(one.to(dtype) for one in new))
        for one in state.seen(0):
            assert one.data.dtype == dtype
            assert torch.isfinite(one.data).all(), name


@each
def test_counts_that_do_not_fit_are_refused(make):
    state = make()
    state.append(0, tokens(4), None, None)
    for count in ([5, 4], [-1, 4], [4]):
        with pytest.raises(UserError, match="4, 4"):
            state.commit(torch.tensor(count))
    state.commit(torch.tensor([4, 4]))
    assert state.layers[0].count == (4, 4)
