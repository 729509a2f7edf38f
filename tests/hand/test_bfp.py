"""Block floating point and its sorted channels by hand; expected numbers are literal."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from laconic.core.state import reordered
from laconic.methods.cache.store.bfp import Bfp, by_loudness, quantize
from laconic.methods.cache.store.full import Full
from laconic.runtime import StateCache, key_loudness


def commit(state, *new):
    state.append(0, new, None, None)
    state.commit(torch.tensor(state.waiting(0)))


def test_a_block_by_hand():
    """4 bits: mantissas of -7 to 7. The greatest, 5.3, is between 4 and 8, so a step is 4 / 4 = 1; of the second block .9 is between .5
    and 1, a step 1/8; a last, shorter one of 0 may have any step."""
    x = torch.tensor([[5.3, -2.4, 0.4, 0.6, 0.9, -0.125, 0.07, 0.05, 0.0]])
    codes, exponents = quantize(x, 4, 4)
    assert (codes.int() - 8).tolist() == [[5, -2, 0, 1, 7, -1, 1, 0, 0]]
    assert exponents.tolist() == [[127, 124, 124]]
    # 7.9 would be 8 steps of 1, and is cut to 7; a power of two is 4 steps
    codes, exponents = quantize(torch.tensor([[7.9, -7.9, 8.0]]), 4, 2)
    assert (codes.int() - 8).tolist() == [[7, -7, 4]] and exponents.tolist() == [[127, 128]]
    # at 2 bits there are -1, 0 and 1, and a step is twice the power of two below the greatest... of 3: 2, which 1.2 comes to as well
    codes, exponents = quantize(torch.tensor([[3.0, 1.2, -0.9]]), 2, 3)
    assert (codes.int() - 2).tolist() == [[1, 1, 0]] and exponents.tolist() == [[128]]


def test_what_is_held_and_read_by_hand():
    state = Bfp(bits=4, block=2)
    keys, values = torch.tensor([[[[5.3, -2.4, 0.9, 0.07]]]]), torch.tensor([[[[1.0, 3.0, 0.25]]]])
    commit(state, keys, values)
    held = state.tensors()
    # steps of 1, 1/8 and 1/2, 1/16: two mantissas in a byte, the first in its low half
    assert held["0.keys.codes.4"].flatten().tolist() == [(5 + 8) + 16 * (-2 + 8), (7 + 8) + 16 * (1 + 8)]
    assert held["0.keys.exponents"].flatten().tolist() == [127, 124]
    assert held["0.values.codes.3"].flatten().tolist() == [(2 + 8) + 16 * (6 + 8), 4 + 8] and held["0.values.exponents"].tolist() == [
        [[[[126, 123]]]]
    ]
    k, v = state.seen(0)
    assert k.data.tolist() == [[[[5.0, -2.0, 0.875, 0.125]]]] and v.data.tolist() == [[[[1.0, 3.0, 0.25]]]]
    assert state.nbytes == 2 + 2 + 2 + 2


def test_bits_a_number():
    # b + 8 / block, with nothing kept in full
    new = torch.randn(1, 2, 600, 64, dtype=torch.bfloat16)
    for bits in (4, 8):
        state = Bfp(bits, 32)
        commit(state, new, new)
        assert state.bits_per_number == bits + 0.25


def test_sorted_channels_lie_together_and_come_back():
    """Loud channels 0 and 2 spoil their neighbours in blocks of two: 9 makes a step of 2, to which .5 is nothing. Sorted, .5 and .25 have a
    step of 1/8 of their own, and are held exactly."""
    keys = torch.tensor([[[[9.0, 0.5, -8.0, 0.25]]]])
    plain, apart = Bfp(block=2), Bfp(block=2).fitted(iter([torch.tensor([[3.0, 0.2, 2.0, 0.1]])]))
    assert apart.orders[0].tolist() == [[0, 2, 1, 3]]
    commit(plain, keys, keys)
    commit(apart, keys, keys)
    # 9 / 2 = 4.5 goes to the even 4
    assert plain.seen(0)[0].data.tolist() == [[[[8.0, 0.0, -8.0, 0.0]]]]
    assert apart.seen(0)[0].data.tolist() == [[[[8.0, 0.5, -8.0, 0.25]]]]
    # values are not sorted
    assert torch.equal(apart.seen(0)[1].data, plain.seen(0)[1].data)
    assert Bfp(sort=False).fitted(iter([torch.ones(1, 4)])).orders == {}
    # a fork, and a state begun again, are sorted too
    assert apart.fork(torch.tensor([0])).orders is apart.orders


def test_attention_does_not_see_the_order():
    """Nothing is quantized yet: every query meets the key that it met."""
    g = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(2, h, 9, 8, generator=g) for h in (2, 2, 6))
    full, ours = Full(), Bfp().fitted(iter([torch.randn(2, 8, generator=g)]))
    for state in (full, ours):
        state.append(0, (keys, values), None, None)
    torch.testing.assert_close(ours.attend(query, 0, None), full.attend(query, 0, None), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.seen(0)[0].data, keys)


def test_sorted_pairs_are_what_sorted_weights_would_give():
    """Rows of the projection, and the tables of the rotary embedding, sorted beforehand give the keys that are sorted as they come."""
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, 1, 5, 8, generator=g), torch.randn(8, 8, generator=g)
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01]).repeat(2)
    cos, sin = angles.cos()[None], angles.sin()[None]
    loud = torch.tensor([[4.0, 1.0, 3.0, 2.0, 4.0, 1.0, 3.0, 2.0]])
    order = by_loudness(loud)
    # a pair is channel i and i + 4
    assert order.tolist() == [[0, 4, 2, 6, 3, 7, 1, 5]]
    keys, _ = apply_rotary_pos_emb(x @ weight.T, x, cos, sin)
    # pairs in the order 0 2 3 1, as a model that turns (i, i + 4) has them
    rows = torch.tensor([0, 2, 3, 1, 4, 6, 7, 5])
    beforehand, _ = apply_rotary_pos_emb(x @ weight[rows].T, x, cos[..., rows], sin[..., rows])
    # beside one another: 0 4 2 6 ...
    together = beforehand[..., torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])]
    torch.testing.assert_close(reordered(keys, order), together, rtol=1e-5, atol=1e-6)


def test_loudness_is_that_of_rotary_pairs():
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # rows of norm 1, 2, 7 and 0.5: pairs (1, 7) and (2, 0.5)
        model.model.layers[1].self_attn.k_proj.weight.copy_(torch.tensor([1.0, 2.0, 7.0, 0.5])[:, None] * torch.eye(4, 8))
    loud = list(key_loudness(model))[1]
    torch.testing.assert_close(loud, torch.tensor([[5.0, 2.125**0.5, 5.0, 2.125**0.5]]))
    cache = StateCache(model, Bfp(block=2))
    assert cache.state.orders[1].tolist() == [[0, 2, 1, 3]] and sorted(cache.state.orders) == [0, 1]


@pytest.mark.parametrize(("knobs", "says"), [({"bits": 1}, "bits=1"), ({"bits": 9}, "2 to 8"), ({"block": 0}, "block=0")])
def test_what_it_cannot_do(knobs, says):
    with pytest.raises(ValueError, match=says):
        Bfp(**knobs)
