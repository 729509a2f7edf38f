"""DGQ by hand: clusters of ranges, steps of each group, the axis that deviates most, and shares in powers of a half."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laconic.anatomy import traced_anatomy
from laconic.core.packed import restore
from laconic.core.part import Rounding, restore_part
from laconic.core.site import Linear, Map, Site, TensorId
from laconic.core.statistic import Extremes, Seen
from laconic.kernels.grids import Grid
from laconic.kernels.ranges import Spans, apart, clustered, ends_of, evenly, powers, steps_of
from laconic.methods.quantize.round.dgq import DGQ, GroupedInputs, Powers, widest
from laconic.methods.quantize.round.rtn import RTN


def site(n, m, **context):
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m), context=context)


def test_alike_ranges_are_one_cluster():
    points = torch.tensor([[-1.0, 1], [-8, 8], [-1.1, 1], [-8, 8.5], [0, 30]])
    found = clustered(points, 3).tolist()
    assert found[0] == found[2] and found[1] == found[3] and len(set(found)) == 3
    # fewer things than clusters: each its own
    assert sorted(clustered(points, 9).tolist()) == [0, 1, 2, 3, 4]
    assert clustered(torch.ones(4, 2), 2).unique().numel() == 1


def test_steps_of_a_group():
    """Channels of -1 to 4 and of -2 to 1 together have -2 to 4: 3 steps of 2, and zero one of them up. 1 to 5 has zero inside."""
    low, high = ends_of(torch.tensor([-1.0, -2, 1]), torch.tensor([4.0, 1, 5]), torch.tensor([0, 0, 1]), 3)
    assert low.tolist() == [-2, 0, 0] and high.tolist() == [4, 5, 0]
    scale, zero = steps_of(low, high, 2)
    torch.testing.assert_close(scale, torch.tensor([2.0, 5 / 3, 1.0]))
    assert zero.tolist() == [1, 0, 0]
    x = torch.tensor([0.3, 9.0, -9.0], requires_grad=True)
    y = evenly(x, torch.tensor(0.25), torch.tensor(2.0), 2)
    # codes 0 to 3 are -0.5 to 0.25
    assert y.tolist() == [0.25, 0.25, -0.5]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1]


def test_groups_of_channels_and_of_positions():
    index, scale, zero = torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([1.0, 0.25]), torch.tensor([1.0, 1.0])
    x = torch.tensor([[[0.6, 0.6], [1.4, 0.3]]])
    assert Spans(2, "channels", index, scale, zero)(x).tolist() == [[[1.0, 0.5], [1.0, 0.25]]]
    assert Spans(2, "positions", index, scale, zero)(x).tolist() == [[[1.0, 1.0], [0.5, 0.25]]]
    # a third position is taken for the last
    assert Spans(2, "positions", index, scale, zero)(x.expand(1, 2, 2).repeat(1, 2, 1)).tolist()[0][2:] == [[0.5, 0.5], [0.5, 0.25]]


def test_ends_of_channels_and_positions():
    x = torch.tensor([[1.0, -2], [3, 4], [5, 0], [-7, 1]])
    where = site(3, 2, positions=2)
    found = Extremes().finish(Extremes().update(Extremes().init(where), Seen(x=x, sequences=2)))
    # channels -7 to 5 and -2 to 4; first rows 1, -2, 5, 0 and second rows 3, 4, -7, 1
    assert found.tolist() == [[-7, -2, -2, -7], [5, 4, 5, 4]]
    # sequences of another length say nothing of positions
    other = Extremes().finish(Extremes().update(Extremes().init(where), Seen(x=x, sequences=1)))
    assert other.tolist() == [[-7, -2, 0, 0], [5, 4, 0, 0]]
    assert widest(torch.tensor([[-1.0, -9], [1, 9]]), torch.tensor([[-9.0, -9], [9, 9]])) == "channels"
    assert widest(torch.tensor([[-9.0, -9], [9, 9]]), torch.tensor([[-1.0, -9], [1, 9]])) == "positions"
    assert widest(torch.ones(2, 4), torch.ones(2, 0)) == "channels"


def test_shares_are_powers_of_a_half():
    """0.1 / 0.4 is 2^-2, 0.15 / 0.4 is 2^-1.4, nearest to 2^-1; with two bits nothing is below 2^-3."""
    shares = torch.tensor([0.4, 0.1, 0.15, 0.0, 1e-6])
    torch.testing.assert_close(powers(shares, torch.tensor(0.4), 2), torch.tensor([0.4, 0.1, 0.2, 0.05, 0.05]))
    torch.testing.assert_close(powers(shares, torch.tensor(0.2), 2), torch.tensor([0.2, 0.1, 0.2, 0.025, 0.025]))


def test_the_first_word_stays_apart():
    maps = torch.tensor([0.7, 0.2, 0.1, 0.9, 0.05, 0.05]).reshape(1, 1, 2, 3)
    # of the others 0.2 is the greatest of the whole map
    torch.testing.assert_close(apart(maps, 4), torch.tensor([0.7, 0.2, 0.1, 0.9, 0.05, 0.05]).reshape(1, 1, 2, 3))
    torch.testing.assert_close(apart(maps, 1)[0, 0, 1], torch.tensor([0.9, 0.1, 0.1]))
    # another sample has another greatest
    two = torch.cat([maps, maps * torch.tensor([1.0, 0.5, 0.5])])
    torch.testing.assert_close(apart(two, 1)[1, 0, 0], torch.tensor([0.7, 0.1, 0.05]))
    part = Powers(4)
    again = restore_part(part.describe())
    assert isinstance(again, Rounding) and again.bits == 4
    scores = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(part.exact()(scores), scores.softmax(-1))
    torch.testing.assert_close(again(scores)[..., 0], scores.softmax(-1)[..., 0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.softmax = nn.Softmax(-1)

    def forward(self, x, over):
        shares = self.softmax(self.query(x) @ self.key(over).mT)
        return self.out(shares @ over)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.other = Attention(), Attention()

    def forward(self, x):
        return self.other(self.own(x, x), x[:, :2] * 2)


def test_the_map_before_an_output_is_found():
    sites = {s.name: s for s in traced_anatomy(Two(), torch.randn(3, 5, 4)).sites()}
    assert sites["own.out"].context["map"] == Map("own.softmax", False)
    assert sites["other.out"].context["map"] == Map("other.softmax", True)
    assert all("map" not in s.context for name, s in sites.items() if not name.endswith("out"))
    assert sites["own.out"].context["positions"] == 5 and sites["other.key"].context["positions"] == 2


def test_what_is_held():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, 10, generator=g), torch.randn(8 * 12, 10, generator=g)
    loud = torch.tensor([1.0, 20.0]).repeat(5)
    method, level = DGQ(hold=RTN(), maps=True), GroupedInputs(Grid(4, None), 4, 2)
    for context in ({}, {"positions": 12}):
        where = site(6, 10, map=Map("cross.softmax", True), **context)
        stats = {Extremes(): Extremes().finish(Extremes().update(Extremes().init(where), Seen(x=x * loud, sequences=8)))}
        change = method(where, {"weight": w}, stats, level)
        (held,) = change.hold.values()
        assert held.nbytes == method.stored(where, level) == RTN().stored(where, level.weight) + max(10, context.get("positions", 1)) + 16
        assert held.axis == "channels"
        assert held.index[:10].tolist() in ([0, 1] * 5, [1, 0] * 5)
        # quiet channels keep steps of their own: at most half of one off
        quiet = (held.feed(x * loud) - x * loud)[:, ::2].abs().max()
        assert float(quiet) <= float(held.scale.min()) * 1.01
        assert list(change.place) == ["cross.softmax"] and change.place["cross.softmax"].bits == 4
        again = restore(held.describe(), held.tensors())
        assert torch.equal(again.matmul(x), held.matmul(x))
    assert not method(site(6, 10, map=Map("a", False)), {"weight": w}, {Extremes(): torch.zeros(2, 10)}, level).place
    with pytest.raises(ValueError, match="groups=0"):
        GroupedInputs(Grid(4), 8, 0)
