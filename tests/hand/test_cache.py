"""Caches on cases small enough to work out by hand; expected numbers are literal."""

from __future__ import annotations

import pytest
import torch

from laconic.core.state import Ragged
from laconic.kernels.attention import attention, dequantize
from laconic.methods.cache.store.full import Full
from laconic.methods.cache.store.kivi import Kivi, quantize


def commit(state, *new):
    state.append(0, new, None, None)
    state.commit(torch.tensor(state.waiting(0)))


def test_ragged_rows_by_hand():
    # one head, one number a token
    a = Ragged.of(torch.tensor([[1.0, 2, 3], [4, 5, 6]])[:, None, :, None], torch.tensor([[False, True, True], [True, False, False]]))
    assert a.lengths == (2, 1) and a.data[:, 0, :, 0].tolist() == [[2, 3], [4, 0]]
    b = Ragged.of(torch.tensor([[7.0], [8]])[:, None, :, None])
    both = a.join(b, b)
    assert both.lengths == (4, 3) and both.data[:, 0, :, 0].tolist() == [[2, 3, 7, 7], [4, 8, 8, 0]]
    inner = both.cut((1, 2), (3, 3))
    assert inner.lengths == (2, 1) and inner.data[:, 0, :, 0].tolist() == [[3, 7], [8, 0]]
    assert both.pick([1, 1]).data[:, 0, :, 0].tolist() == [[4, 8, 8], [4, 8, 8]]


def test_min_max_grid_by_hand():
    # z = -1, s = 3 / 3; a second, shorter group: z = 4, s = 6 / 3
    x = torch.tensor([[-1.0, -0.4, 0.6, 2.0, 4.0, 10.0, 6.9]])
    codes, scale, zero = quantize(x, 2, 4)
    assert codes.tolist() == [[0, 1, 2, 3, 0, 3, 1]]
    assert scale.tolist() == [[1.0, 2.0]] and zero.tolist() == [[-1.0, 4.0]]
    assert scale.dtype == zero.dtype == torch.bfloat16
    assert dequantize(codes, scale, zero, 4).tolist() == [[-1.0, 0.0, 1.0, 2.0, 4.0, 10.0, 6.0]]
    # zero is no part of the grid, unlike that of weights: 100 to 103 keep steps of 1
    assert quantize(torch.tensor([[100.0, 101.0, 102.0, 103.0]]), 2, 4)[0].tolist() == [[0, 1, 2, 3]]
    # equal numbers are held as they are
    assert dequantize(*quantize(torch.full((1, 4), 2.5), 2, 4), 4).tolist() == [[2.5] * 4]
    assert quantize(x.half(), 2, 4)[1].dtype == torch.float16


def test_kivi_by_hand():
    state = Kivi(bits=2, group=4, residual=4)
    # two channels of four tokens: z = 0, s = 1 and z = -4, s = 4
    keys = torch.tensor([[0.0, -4], [1.4, 8], [1.6, 0], [3, 4.9]])[None, None]
    # one token is a group: z = 10, s = 10
    values = torch.tensor([[10.0, 40, 24, 26], [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 1]])[None, None]
    commit(state, keys[:, :, :3], values[:, :, :3])
    # three tokens wait: nothing is quantized
    assert set(state.tensors()) == {"0.keys.recent", "0.values.recent"}
    assert state.nbytes == 3 * (2 + 4) * 4 and state.bits_per_number == 32
    commit(state, keys[:, :, 3:], values[:, :, 3:])
    held = state.tensors()
    # the residual of keys is full: codes 0 1 2 3 and 0 3 1 2 from the low end, a byte each
    assert held["0.keys.codes"].flatten().tolist() == [0b11_10_01_00, 0b10_01_11_00]
    assert held["0.keys.scales"].flatten().tolist() == [1, 4] and held["0.keys.zeros"].flatten().tolist() == [0, -4]
    assert held["0.keys.recent"].shape == (1, 1, 0, 2)
    assert "0.values.codes" not in held
    # a fifth token: keys begin to wait again, the oldest value leaves
    commit(state, torch.tensor([[[[7.0, 7.0]]]]), torch.tensor([[[[0.0, 0, 0, 0]]]]))
    held = state.tensors()
    assert held["0.values.codes"].flatten().tolist() == [0b10_01_11_00]
    assert held["0.values.scales"].flatten().tolist() == [10] and held["0.values.zeros"].flatten().tolist() == [10]
    k, v = state.seen(0)
    assert k.data[0, 0].tolist() == [[0, -4], [1, 8], [2, 0], [3, 4], [7, 7]]
    assert v.data[0, 0].tolist() == [[10, 40, 20, 30], [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 1], [0, 0, 0, 0]]
    # keys: 2 bytes of codes, 2 x 2 of s, 2 x 2 of z, 1 token of 2 fp32; values: 1, 2, 2, and 4 tokens of 4 fp32
    assert state.nbytes == (2 + 4 + 4 + 8) + (1 + 2 + 2 + 64)
    assert state.bits_per_number == 8 * state.nbytes / (5 * 6)


def test_the_axes_are_knobs():
    x = torch.tensor([[0.0, 300], [1, 200], [2, 100], [3, 0]])[None, None]
    # per channel 0 1 2 3 is a grid, per token it drowns beside the loud channel
    channel, token = Kivi(2, 4, 4, keys="channel", values="channel"), Kivi(2, 2, 0, keys="token", values="token")
    commit(channel, x, x)
    commit(token, x, x)
    assert channel.seen(0)[0].data.tolist() == channel.seen(0)[1].data.tolist() == x.tolist()
    # z = 0, 1, 2, 0 and s = 100, 66.5, 32.75, 1 in bf16
    assert token.seen(0)[0].data[0, 0].tolist() == [[0, 300], [1, 200.5], [2, 100.25], [3, 0]]
    assert token.tensors()["0.keys.recent"].shape[2] == 0


def test_bits_of_the_paper():
    # away from the residual: b + 32 / G
    new = torch.randn(1, 2, 4096, 64)
    for bits in (2, 4):
        state = Kivi(bits, 32, 128)
        commit(state, new.bfloat16(), new.bfloat16())
        # keys: 4096 tokens in codes; values: 128 of them in 16 bits
        assert state.bits_per_number == pytest.approx((bits + 1) + (16 - bits - 1) * 128 / 4096 / 2)
    full = Full()
    commit(full, new.bfloat16(), new.bfloat16())
    assert full.bits_per_number == 16


def test_more_bits_err_less_and_by_half_a_step_at_most():
    new = torch.randn(2, 2, 512, 40, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (1, 2, 3, 4, 8):
        state = Kivi(bits)
        commit(state, new, new)
        delta = [(one.data - new).abs() for one in state.seen(0)]
        errors.append(float(delta[0].mean()))
        steps = new.reshape(2, 2, 16, 32, 40)
        step = (steps.amax(3, keepdim=True) - steps.amin(3, keepdim=True)) / (2**bits - 1)
        # scale and zero are rounded to bf16
        assert (delta[0].reshape(steps.shape) <= 0.5 * step + 0.03).all()
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "1 to 8"),
        ({"group": 0}, "group=0"),
        ({"residual": -1}, "residual=-1"),
        ({"residual": 100}, "multiple of 32"),
        ({"residual": 0}, "multiple of 32"),
        ({"keys": "head"}, "channel"),
    ],
)
def test_kivi_refuses_what_it_cannot_do(knobs, says):
    with pytest.raises(ValueError, match=says):
        Kivi(**knobs)
    Kivi(group=30, residual=100, keys="token")


def test_attention_by_hand():
    # keys 0 and ln 3 in one channel: weights 1/4 and 3/4 for the newest token, 1 for the first
    keys = torch.tensor([0.0, torch.log(torch.tensor(3.0))])[None, None, :, None]
    values = torch.tensor([4.0, 8.0])[None, None, :, None]
    out = attention(torch.ones(1, 1, 2, 1), keys, values, (2,))
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 7.0]))
    # of a row that holds one token, the earlier query is padding
    out = attention(torch.ones(1, 1, 2, 1), keys, values, (1,))
    assert out.flatten().tolist() == [0.0, 4.0]
