"""FireQ's parts by hand; expected numbers are literal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from laconic.core.packed import restore
from laconic.core.site import Conv, Linear, Site, TensorId
from laconic.core.statistic import Seen
from laconic.kernels.grids import Grid, floated, from_bytes, octave_of, storable, to_bytes
from laconic.kernels.inputs import floating
from laconic.methods.cache.store.fireq import FireQ as Store
from laconic.methods.cache.store.fireq import followed, quantize
from laconic.methods.cache.store.full import Full
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.inputs import Fed, Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.quantize.smooth.fireq import FireQ, Radii, balanced, entries, looked_up, paired

GRID = Grid(4, 128, symmetric=True, scales="e4m3")


def site(n: int, m: int) -> Site:
    return Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (n, m))


def held(weight: torch.Tensor, grid: Grid = GRID) -> Grouped:
    (form,) = RTN()(site(*weight.shape), {"weight": weight}, {}, grid).hold.values()
    assert isinstance(form, Grouped)
    return form


# ---- scales in fp8


def test_every_number_of_e4m3_is_its_byte():
    bits = torch.arange(1, 127, dtype=torch.uint8)
    numbers = bits.view(torch.float8_e4m3fn).float()
    assert torch.equal(from_bytes(bits), numbers) and torch.equal(to_bytes(numbers), bits)
    # eight steps an octave, ties to the even one; below 2^-6 steps of 2^-9, and no less than one of them
    found = floated(torch.tensor([1.0, 1.06, 1.0625, 1.19, 17.0, 2**-7 + 2**-10, 2**-9, 2**-20]))
    assert found.tolist() == [1.0, 1.0, 1.0, 1.25, 16.0, 2**-7, 2**-9, 2**-9]


def test_a_matrix_has_one_power_of_two():
    """The greatest scale is 28 to 56 times it, so that -8 times a scale, 448 at most, is in e4m3's range too."""
    assert [int(octave_of(torch.tensor(s))) for s in (56.0, 57.0, 28.0, 1.0, 0.01)] == [0, 1, -1, -5, -12]
    scale = torch.tensor([[1.0, 0.5625, 0.57, 2.0**-12, 2.0**-13, 2.0**-15, 0.0]])
    # in units of 2^-5: 32, 18, 18.24 (steps of 2), 2^-7, 2^-8, 2^-10 and 0, which the least, 2^-9, stands for
    assert storable(scale, GRID).tolist() == [[1.0, 0.5625, 0.5625, 2.0**-12, 2.0**-13, 2.0**-14, 2.0**-14]]


def test_what_is_stored_by_hand():
    """7.5 steps are the greatest weight: a scale of 0.4, and of 0.1 in the shorter last group, of which e4m3 has 0.40625 and 0.1015625.
    Halves of steps go to the even code."""
    weight = torch.tensor([[3.0, -3.0, 0.4, -0.2, 0.75, 0.1]])
    form = held(weight, Grid(4, 4, symmetric=True, scales="e4m3"))
    assert form.wide_scales().tolist() == [[0.40625, 0.1015625]]
    assert (form.plain()[0].int() - 8).tolist() == [[7, -7, 1, 0, 7, 1]]
    assert form.dense().tolist() == [[2.84375, -2.84375, 0.40625, 0.0, 0.7109375, 0.1015625]]
    # 0.40625 = 52 * 2^-7: 1.625 * 2^5, and 13 * 2^-7: 1.625 * 2^3
    assert form.least.tolist() == [-7] and form.scales.tolist() == [[(5 + 7) * 8 + 5, (3 + 7) * 8 + 5]]
    # three bytes of codes, two of scales, two for the power
    assert form.nbytes == Grouped.bytes_of(1, 6, form.grid) == 7
    again = restore(form.describe(), form.tensors())
    assert torch.equal(again.dense(), form.dense()) and form.describe()["scales"] == "e4m3"


def test_bits_a_weight_and_what_is_lost():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    ours, wide = held(weight), held(weight, Grid(4, 128, symmetric=True))
    assert ours.nbytes == 256 * (256 + 4) + 2 and wide.nbytes == 256 * (256 + 8)
    errors = [float((form.dense() - weight).norm() / weight.norm()) for form in (ours, wide)]
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize("spoil", ["dead row", "dead", "tiny", "tiny row", "outlier", "ragged"])
def test_nothing_is_lost_to_poor_weights(spoil):
    weight = torch.randn(6, 300 if spoil == "ragged" else 256, generator=torch.Generator().manual_seed(1))
    if spoil == "dead row":
        weight[2] = 0
    if spoil == "dead":
        weight *= 0
    if spoil == "tiny":
        weight *= 1e-30
    if spoil == "tiny row":
        weight[3] *= 1e-9
    if spoil == "outlier":
        weight[0, 5] = 1e6
    form = held(weight)
    dense = form.dense()
    assert torch.isfinite(dense).all() and form.nbytes == Grouped.bytes_of(*weight.shape, GRID)
    if spoil in ("dead row", "dead"):
        assert not dense[2].any()
    # a step is 1/7 of a group's greatest weight or less, unless its scale is raised: then what is lost is nothing beside the others
    step = storable(form.wide_scales().float(), GRID).repeat_interleave(128, 1)[:, : weight.shape[1]]
    assert bool(((dense - weight).abs() <= 0.76 * step).all())
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(form.matmul(x), F.linear(x, dense), rtol=1e-3, atol=1e-3 * float(dense.abs().max()) + 1e-30)


def test_the_table_of_a_group_by_hand():
    """A scale of 1.125 in units of the matrix: -9 to 7.875. In fp8 there are steps of 1 from 8 on and of 1/2 below: 7.875 goes to 8, and
    6.75, half-way between two, to the even 7 (14 halves)."""
    exact = entries(torch.tensor([[1.125]]), 0, False)[0, 0]
    assert exact.tolist() == [1.125 * c for c in range(-8, 8)]
    assert entries(torch.tensor([[1.125]]), 0, True)[0, 0].tolist() == [
        -9.0, -8.0, -7.0, -5.5, -4.5, -3.5, -2.25, -1.125, 0.0, 1.125, 2.25, 3.5, 4.5, 5.5, 7.0, 8.0,
    ]  # fmt: skip
    weight = torch.randn(8, 300, generator=torch.Generator().manual_seed(3))
    form = held(weight)
    codes, scale, _ = form.plain()
    assert torch.equal(looked_up(codes, entries(scale, int(form.least), False), GRID), form.dense())


# ---- inputs in fp8


def test_inputs_by_hand():
    """448 is the largest number: a scale of 2 for 896. 101 / 2 = 50.5 is between 48 and 52, 3 / 2 is a number."""
    x = torch.tensor([[896.0, -101.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert floating(x).tolist() == [[896.0, -104.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    x = torch.randn(7, 65, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 4)[:, None]
    scale = (x.abs().amax(-1, keepdim=True) / 448).bfloat16().float()
    assert torch.equal(floating(x), (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    # an outlier costs the others nothing but what lies 2^15 below it
    loud = torch.tensor([[1000.0, 1.0, 0.1]])
    assert float((floating(loud) / loud - 1).abs().max()) < 0.07
    assert floating(loud.bfloat16()).dtype == torch.bfloat16
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(floating(image, 3), floating(image.flatten(1)).reshape(image.shape))


def test_weights_and_inputs_are_one_level():
    level = WeightAndInputs(GRID, "e4m3")
    weight = torch.randn(8, 256)
    (form,) = Inputs(RTN())(site(8, 256), {"weight": weight}, {}, level).hold.values()
    assert isinstance(form, Fed) and form.nbytes == Inputs(RTN()).stored(site(8, 256), level) == 8 * (128 + 2) + 2
    x = torch.randn(3, 256)
    torch.testing.assert_close(form.matmul(x), F.linear(floating(x), form.dense()), rtol=1e-4, atol=1e-4)
    again = restore(form.describe(), form.tensors())
    assert torch.equal(again.matmul(x), form.matmul(x))
    conv = Site("layer", Conv(), {"weight": TensorId("layer.weight")}, (4, 3, 2, 2))
    (form,) = Inputs(RTN())(conv, {"weight": torch.randn(4, 3, 2, 2)}, {}, level).hold.values()
    image = torch.randn(2, 3, 5, 5)
    assert torch.equal(form.feed(image), floating(image, 3))
    with pytest.raises(ValueError, match="e4m3"):
        WeightAndInputs(GRID, "e5m2")


# ---- factors before the turn


def test_radii_by_hand():
    """Heads of five channels, two pairs and one alone: (3, 4) and (1, 0) come to 5 and 1 for both, whatever positions do to them."""
    y = torch.tensor([[3.0, 1.0, 4.0, 0.0, -2.0], [0.0, 0.0, 1.0, -0.5, 1.0]])
    kind, where = Radii(5, 2), site(5, 3)
    whole = kind.update(kind.init(where), Seen(y=y))
    assert whole.tolist() == [5.0, 1.0, 5.0, 1.0, 2.0]
    halves = [kind.update(kind.init(where), Seen(y=part)) for part in y.split(1)]
    assert torch.equal(kind.merge(*halves), whole)
    assert torch.equal(kind.update(whole, Seen(y=y[:0])), whole)
    assert kind.update(kind.init(where), Seen(y=y, mask=torch.tensor([False, True]))).tolist() == [1.0, 0.5, 1.0, 0.5, 1.0]


def test_factors_of_pairs_by_hand():
    """Radii 8, 2, 1 and 4: the middle one of four is 2, the loudest stays."""
    radii = torch.tensor([[8.0, 2.0, 1.0, 4.0, 8.0, 2.0, 1.0, 4.0]])
    assert paired(radii, 4, 1.0, 0).tolist() == [[0.25, 1.0, 2.0, 0.5] * 2]
    assert paired(radii, 4, 1.0, 1).tolist() == [[1.0, 1.0, 2.0, 0.5] * 2]
    assert paired(radii, 4, 0.5, 1).tolist() == [[1.0, 0.5, 1.0, 0.25] * 2]
    # a dead pair stays; channels that are not turned count alone
    assert paired(torch.tensor([[4.0, 0.0, 4.0, 0.0, 2.0, 1.0]]), 2, 1.0, 0).tolist() == [[0.5, 1.0, 0.5, 1.0, 1.0, 2.0]]
    assert paired(torch.zeros(2, 4), 2, 1.0, 1).tolist() == [[1.0] * 4] * 2
    assert paired(radii, 0, 1.0, 99).tolist() == [[1.0] * 8]


def test_factors_of_inputs_by_hand():
    """a = 1: the sizes of inputs, 4 and 1, times what makes the product of both ends 1. a = 0: the inverse of the weights' sizes."""
    inputs, weights = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])
    assert balanced(inputs, weights, 1.0).tolist() == [2.0, 0.5]
    torch.testing.assert_close(balanced(inputs, weights, 0.0), torch.tensor([3.0, 1 / 3]))
    torch.testing.assert_close(balanced(inputs, weights, 0.5), torch.tensor([6.0**0.5, 6.0**-0.5]))
    # dead channels stay
    assert balanced(torch.tensor([4.0, 0.0, 1.0]), torch.ones(3), 1.0).tolist() == [2.0, 1.0, 0.5]
    assert balanced(torch.zeros(2), torch.zeros(2), 0.5).tolist() == [1.0, 1.0]
    for wrong in ({"alpha": 0.0}, {"top_k": -1}, {"bits": 9}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            FireQ(**wrong)


# ---- the cache


def test_a_token_by_hand():
    """A scale of 3.5 / 7 = 0.5 for all of a token; halves go to the even code; of zeros the scale is 0."""
    codes, scales = quantize(torch.tensor([[3.5, -3.5, 0.25, 0.75, -0.3], [0.0] * 5]), 4, 128)
    assert (codes.int() - 8).tolist() == [[7, -7, 0, 2, -1], [0] * 5] and scales.tolist() == [[0.5], [0.0]]
    codes, scales = quantize(torch.tensor([[3.5, 1.0, 0.25, 0.75, -0.3]]), 4, 4)
    assert scales.shape == (1, 2) and float(scales[0, 1]) == pytest.approx(0.3 / 7, rel=0.004)
    state = Store(top_k=0)
    keys = torch.tensor([[[[3.5, -3.5, 0.25, 0.75]]]])
    state.append(0, (keys, keys), None, None)
    state.commit(torch.tensor([1]))
    assert state.seen(0)[0].data.tolist() == [[[[3.5, -3.5, 0.0, 1.0]]]]
    # two bytes of codes and two of a scale, for keys and values
    assert state.nbytes == 8 and state.tensors()["0.keys.codes.4"].flatten().tolist() == [15 + 16 * 1, 8 + 16 * 10]


def test_bits_a_number():
    new = torch.randn(1, 2, 600, 128, dtype=torch.bfloat16)
    for group, bits in ((128, 4.125), (32, 4.5)):
        state = Store(group=group, top_k=0)
        state.append(0, (new, new), None, None)
        state.commit(torch.tensor([600]))
        assert state.bits_per_number == bits


def test_factors_after_the_turn_by_hand():
    """Pairs (0, 2) and (1, 3): channel 0 is the loudest, and its mate 2 goes where it goes: to the largest of the others, 2."""
    sizes = torch.tensor([[8.0, 2.0, 0.5, 1.0]])
    assert followed(sizes, 2, 1, 1.0).tolist() == [[0.25, 1.0, 4.0, 1.0]]
    assert followed(sizes, 2, 1, 0.5).tolist() == [[0.125, 1.0, 2.0, 1.0]]
    # all of them: to the least
    assert followed(sizes, 2, 9, 1.0).tolist() == [[0.0625, 0.25, 1.0, 0.5]]
    # nothing is turned: no mate
    assert followed(sizes, 0, 1, 1.0).tolist() == [[0.25, 1.0, 1.0, 1.0]]
    assert followed(torch.zeros(1, 4), 2, 1, 1.0).tolist() == [[1.0] * 4]
    assert followed(torch.tensor([[8.0, 2.0, 0.0, 1.0]]), 2, 1, 1.0).tolist() == [[0.25, 1.0, 1.0, 1.0]]


def test_a_loud_channel_costs_the_others_nothing():
    """7 in channel 0 makes a step of 1, to which 0.3 is nothing; divided by 16 it makes one of 1/16."""
    keys = torch.tensor([[[[7.0, 0.3, 0.25, -0.2]]]])
    for factors, wanted in (({}, [7.0, 0.0, 0.0, 0.0]), ({0: torch.tensor([[0.0625, 1.0, 1.0, 1.0]])}, [7.0, 0.3125, 0.25, -0.1875])):
        state = Store(factors=factors)
        state.append(0, (keys, keys), None, None)
        # a token that waits is as it came
        assert torch.equal(state.seen(0)[0].data, keys)
        state.commit(torch.tensor([1]))
        assert state.seen(0)[0].data.tolist() == [[[wanted]]]
        # values have no factors
        assert state.seen(0)[1].data.tolist() == [[[[7.0, 0.0, 0.0, 0.0]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_see_factors(dtype):
    """Nothing is rounded yet, so every query meets the key that it met; then what is kept and what waits meet the same query."""
    g = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(2, h, 9, 8, generator=g).to(dtype) for h in (2, 2, 6))
    factors = {0: torch.rand(2, 8, generator=g) + 0.1}
    ours, full = Store(bits=8, factors=factors), Full()
    for state in (full, ours):
        state.append(0, (keys, values), None, None)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(ours.attend(query, 0, None), full.attend(query, 0, None), **near)
    assert torch.equal(ours.seen(0)[0].data, keys)
    for state in (full, ours):
        state.commit(torch.tensor([5, 5]))
        state.append(0, (keys[:, :, 5:], values[:, :, 5:]), None, None)
    torch.testing.assert_close(ours.attend(query, 0, None), full.attend(query, 0, None), rtol=0.03, atol=0.03)
    assert torch.equal(ours.seen(0)[0].data[:, :, 5:], keys[:, :, 5:])


def test_a_state_looks_at_keys_only_where_it_has_to():
    asked = []

    def peaked():
        asked.append(1)
        return iter([(torch.tensor([[8.0, 2.0, 0.5, 1.0]]), 2), None])

    state = Store(top_k=1).fitted(iter([]), peaked)
    assert state.factors[0].tolist() == [[0.25, 1.0, 4.0, 1.0]] and 1 not in state.factors and asked == [1]
    assert state.fitted(iter([]), peaked) is state and Store(top_k=0).fitted(iter([]), peaked).factors == {} and asked == [1]
    assert state.fork(torch.tensor([], dtype=torch.long)).factors is state.factors
    for wrong in ({"bits": 1}, {"group": 0}, {"top_k": -1}, {"beta": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Store(**wrong)
