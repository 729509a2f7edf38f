"""CHESS by hand: which neurons and inputs are left out for a token, and what is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laconic.core.router import Load
from laconic.methods.prune.activation.chess import CHESS, MOST, Inputs, Neurons, quantile, tallied, thresholds

NAMES = {"gate": "gate", "up": "up", "down": "down"}


class Layer(nn.Module):
    """down(relu(gate x) * (up x)) over four neurons of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((1, 4), (1, 4), (4, 1)))
        self.act = nn.ReLU()
        self.gate.weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        self.up.weight.data = torch.tensor([[8.0], [-4.0], [1.0], [1.0]])
        self.down.weight.data = torch.tensor([[1.0, 1.0, 1.0, 10.0]])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def layer(share: float = 0.5, channels: bool = True) -> Neurons:
    part = Neurons(4, share, channels, NAMES)
    model = nn.ModuleDict({"mlp": Layer()})
    assert part.fits("mlp", model)
    part.around("mlp", model)
    part.begin(torch.Generator())
    return part


def looked(part: Neurons, x: Tensor) -> Neurons:
    part.run, part.asks = "looking", "all"
    for _ in range(part.looks):
        part(x)
        part.looked()
    part.run, part.asks = "gathered", "router"
    part.forget()
    return part


def test_quantiles_of_a_tally():
    tally = tallied(torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]))
    assert int(tally.sum()) == 5
    # three of five reach 0.6; nothing lies below the least
    assert [quantile(tally, share) for share in (0.0, 0.2, 0.6, 0.61, 0.99)] == [0.0, 0.0, 2.0, 4.0, 8.0]


def test_thresholds_of_channels():
    found = thresholds(6.0, torch.tensor([2.0, 3.0, 1e-38, 0.0]))
    assert found.tolist() == [3.0, 2.0, MOST, MOST]
    assert thresholds(0.0, torch.tensor([2.0, 0.0])).tolist() == [0.0, 0.0]


def test_neurons_by_hand():
    # x = 1 and x = 2: mean |u| is 12, 6, 1.5, 1.5; importances a E|u| at 1: 12, 12, 4.5, 6, at 2 twice that.
    # sorted: 4.5, 6, 9, 12, 12, 12, 24, 24; half of them reach to 12, which stays
    part = looked(layer(), torch.tensor([[1.0], [2.0]]))
    assert part.threshold.tolist() == [1.0, 2.0, 8.0, 8.0]
    # of x = 1 the first two run: 1 * 8 - 2 * 4; 4 weights of the gate, 2 * 2 of the others
    assert part(torch.tensor([[1.0]])).tolist() == [[0.0]]
    assert part.load == Load(12.0, 8.0, 12.0)
    # of x = 2: 2 * 16 - 4 * 8, and the fourth, 8 * 2 * 10; two tokens at once are computed whole, and masked
    assert part(torch.tensor([[2.0]])).tolist() == [[160.0]]
    assert part(torch.tensor([[1.0], [2.0]])).tolist() == [[0.0], [160.0]]
    part.asks = "all"
    assert part(torch.tensor([[1.0]])).tolist() == [[8.0 - 8.0 + 3.0 + 40.0]]


def test_one_threshold_for_all_channels_is_cats():
    # |a| at 1: 1, 2, 3, 4, at 2 twice that: half of them reach to 3
    part = looked(layer(channels=False), torch.tensor([[1.0], [2.0]]))
    assert part.threshold.tolist() == [3.0] * 4
    assert part(torch.tensor([[1.0]])).tolist() == [[43.0]]


def test_inputs_by_hand():
    part = Inputs(4, 0.5)
    model = nn.ModuleDict({"q": nn.Linear(4, 2)})
    model.q.weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 4.0, torch.nan]])
    model.q.bias.data = torch.tensor([0.5, 0.0])
    assert part.fits("q", model)
    part.around("q", model)
    part.begin(torch.Generator())
    part.requires_grad_(False)
    part.run, part.asks = "looking", "all"
    part(torch.tensor([[1.0, -2.0, 3.0, 4.0], [8.0, 0.5, 0.0, -16.0]]))
    part.looked()
    part.run, part.asks = "gathered", "router"
    # 0, 0.5, 1, 2 | 3, 4, 8, 16: what reaches the fourth stays
    assert part.threshold.tolist() == [2.0]
    part.forget()
    # the last column is not read: what stands there cannot be seen
    torch.testing.assert_close(part(torch.tensor([1.0, 2.0, -3.0, 0.0])), torch.tensor([-0.5, -8.0]))
    assert part.load == Load(8.0, 4.0, 8.0)


def test_what_does_not_fit():
    class Odd(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert not Neurons(4, 0.5, True, NAMES).fits("mlp", nn.ModuleDict({"mlp": Odd()}))
    norm = nn.ModuleDict({"mlp": nn.Sequential()})
    assert not Neurons(4, 0.5, True, NAMES).fits("mlp", norm)
    for wrong in ({"share": 1.0}, {"share": -0.1}, {"share": 0.0, "attention": 0.0}, {"projections": "qx"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CHESS(**wrong)
