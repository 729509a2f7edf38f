"""LLM-FP4 by hand: float grids with exponents of channels, the search on two channels, and weights that take the exponents in."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from laconic.core.packed import restore
from laconic.core.site import Embedding, Linear, Site, TensorId
from laconic.core.statistic import Peaks, Sample, Seen
from laconic.kernels.inputs import Floats
from laconic.kernels.levels import decode, encode, values
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.round.llmfp4 import LLMFP4, FloatBits, best_rows, formats, pre_shifted, row_of, searched

E2M1 = row_of("e2m1")


def site(n, m, kind=Linear):
    return Site("a", kind(), {"weight": TensorId("a.weight")}, (n, m))


def held(weight, x, **knobs):
    method = LLMFP4(**knobs)
    stats = {kind: kind.finish(kind.update(kind.init(site(*weight.shape)), Seen(x=x))) for kind in method.wants}
    (form,) = method(site(*weight.shape), {"weight": weight}, stats, FloatBits()).hold.values()
    return form


def loud(t, m, seed=0):
    """Inputs of channels that differ by factors of up to 64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(t, m, generator=g) * 2.0 ** torch.randint(-6, 1, (m,), generator=g)


def test_the_formats_of_four_bits():
    assert values("e1m2").tolist()[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert values("e3m0").tolist()[:8] == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert [levels.table for levels in formats(4)] == ["e2m1", "e1m2", "e3m0"]
    assert [levels.table for levels in formats(8)] == ["e4m3", "e5m2"]
    with pytest.raises(ValueError, match="inputs=5"):
        FloatBits(4, 5)


def test_inputs_on_a_grid_of_their_channel():
    """The scale .5 makes numbers up to 3. 2.6 is 5.2 units, nearest to 6; with a shift of 2 units are an eighth, .3 is 2.4 of them, nearest
    to 2; with a shift of 1 a fourth, -9 is beyond the greatest, 1.5."""
    feed = Floats(E2M1, torch.tensor([0, 2, 1], dtype=torch.int8), torch.tensor([0.5]))
    x = torch.tensor([[2.6, 0.3, -9.0]], requires_grad=True)
    y = feed(x)
    assert y.tolist() == [[3.0, 0.25, -1.5]]
    y.sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 1.0]]
    assert feed(x.bfloat16()).dtype == torch.bfloat16


def test_exponents_of_channels():
    """Peaks 8, 1, 3, 0: log2 of 8 / peak is 0, 3, 1.4, none; two bits of exponent leave 0 to 3, one bit 0 and 1, three 0 to 7."""
    peaks = torch.tensor([8.0, 1.0, 3.0, 0.0])
    assert pre_shifted(peaks, E2M1, 1.0).shifts.tolist() == [0, 3, 1, 3]
    assert pre_shifted(peaks, row_of("e1m2"), 1.0).shifts.tolist() == [0, 1, 1, 1]
    assert pre_shifted(peaks, row_of("e3m0"), 1.0).shifts.tolist() == [0, 3, 1, 7]
    assert pre_shifted(peaks, E2M1, 1.0, shift=False).shifts.tolist() == [0, 0, 0, 0]
    # at three fourths the loudest channel is clipped at 6, the greatest number
    assert pre_shifted(peaks, E2M1, 0.75).scale.tolist() == [1.0]


def test_a_row_is_clipped_where_its_output_errs_less():
    """Weights (6, 1.3) meet inputs (0, 1): only the second counts. Units of 1 give 1.5 for 1.3, an error of .2; at a share of .65, which
    bf16 has as .6484375, 2 units are 1.296875."""
    weight, inputs = torch.tensor([[6.0, 1.3]]), torch.tensor([[0.0, 1.0]])
    scale, error = best_rows(weight, E2M1, inputs @ weight.T, inputs, [1.0, 0.65])
    assert scale.tolist() == [[0.6484375]]
    assert float(error) == pytest.approx(0.003125**2, rel=1e-2)


def test_the_search_is_the_best_of_what_it_tried():
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(6, 8, generator=g), loud(40, 8)
    peaks = x.abs().amax(0)
    levels, scale, feed = searched(weight, x, peaks, (formats(4), formats(4)), shift=True, steps=5, rounds=1)
    near = decode(encode(weight, scale, levels, None), scale, levels, None)

    def error(how):
        return float((how(x) @ near.T - x @ weight.T).square().sum())

    every = [pre_shifted(peaks, one, share) for one in formats(4) for share in [1.0, *torch.linspace(1.2, 0.3, 5).tolist()]]
    assert error(feed) == min(error(one) for one in every)
    # exponents of channels are worth more than any format or clipping
    plain = searched(weight, x, peaks, (formats(4), formats(4)), shift=False, steps=5, rounds=1)[2]
    assert error(feed) < 0.5 * error(plain)


def test_folded_weights_give_the_same_bits():
    """Exponents in the weights, or a factor a channel at the inputs: the same products, so the same sums."""
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        weight, x = torch.randn(24, 40, generator=g), loud(64, 40, seed)
        form = held(weight, x)
        assert form.shifts.unique().numel() > 2
        feed = form.feed
        explicit = F.linear(feed(x), form.dense())
        # 2^c Q has no exponents of channels left, and the weights have them
        assert torch.equal(F.linear(feed.shifted(feed(x)), form.folded().dense()), explicit)
        assert torch.equal(feed.shifted(feed(x)) / feed.scale, (feed.shifted(feed(x)) / feed.scale).round(decimals=2))


def test_what_is_held():
    weight, x = torch.randn(6, 10), loud(50, 10)
    form = held(weight, x)
    # codes of half a byte, a scale of two a row, a byte a channel, one number of four
    assert form.nbytes == 6 * 5 + 2 * 6 + 10 + 4 == LLMFP4().stored(site(6, 10), FloatBits())
    again = restore(form.describe(), form.tensors())
    assert torch.equal(again.matmul(x), form.matmul(x)) and again.table == form.table
    # a table is looked up in, and held in the same floats
    table = LLMFP4()(site(6, 10, Embedding), {"weight": weight}, {}, FloatBits())
    (rows,) = table.hold.values()
    assert isinstance(rows, Leveled) and rows.nbytes == 42 == LLMFP4().stored(site(6, 10, Embedding), FloatBits())


def test_a_sample_does_not_depend_on_how_its_rows_came():
    x, where, few = torch.randn(100, 5), site(3, 5), Sample(10)
    once = few.update(few.init(where), Seen(x=x))
    order = torch.randperm(100)
    parts = few.init(where)
    for part in x[order].split(7):
        parts = few.merge(parts, few.update(few.init(where), Seen(x=part)))
    assert torch.equal(once, parts) and once.shape == (10, 5)
    assert all(any(torch.equal(row, one) for one in x) for row in once)
    assert torch.equal(Peaks().finish(Peaks().update(Peaks().init(where), Seen(x=x))), x.abs().amax(0))
