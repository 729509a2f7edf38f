"""Routers by hand: which experts and filters are chosen, what they are taught, what runs and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.router import Load
from laconic.core.site import Conv, Site, Sublayer, TensorId
from laconic.methods.route.gate.factorllm import Experts, FactorLLM, chosen, imitation, prior
from laconic.methods.route.gate.ftwt import FTWT, Gated, fired, gathered, pooled


class Layer(nn.Module):
    """relu(gate x) (up x) over four neurons of one channel."""

    def __init__(self, bias: float | None = None) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(1, 4, bias=False), nn.Linear(1, 4, bias=False)
        self.down = nn.Linear(4, 1, bias=bias is not None)
        self.gate.weight.data = torch.tensor([[1.0], [-1.0], [2.0], [1.0]])
        self.up.weight.data = torch.tensor([[1.0], [1.0], [1.0], [2.0]])
        self.down.weight.data = torch.ones(1, 4)
        if bias is not None:
            self.down.bias.data.fill_(bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.gate(x)) * self.up(x))


RUNS = ((0,), (1,), (2,), (3,))
X = torch.tensor([[1.0], [-1.0]])
ROUTER = torch.tensor([[0.0], [-1.0], [1.0], [2.0]])


def experts(active: int, scale: float, bias: float | None = None, runs=RUNS) -> Experts:
    part = Experts(1, active, 0.5, scale, [("gate", 0, runs), ("up", 0, runs), ("down", 1, runs)])
    model = nn.ModuleDict({"mlp": Layer(bias)})
    part.around("mlp", model)
    part.router = nn.Parameter(ROUTER[: len(runs)].clone())
    return part


def test_experts_by_hand():
    part = experts(2, 2.0)
    # x = 1: relu(1) 1, relu(-1) 1, relu(2) 1, relu(1) 2; x = -1: only the second fires, and up is -1
    each = torch.stack([part.expert(i, X) for i in range(4)])[..., 0].T
    assert each.tolist() == [[1.0, 0.0, 2.0, 2.0], [0.0, -1.0, 0.0, 0.0]]
    # logits 0, -1, 1, 2: the last two run, 2 (2 + 2); their negatives: the first two, 2 (0 - 1)
    assert part(X).tolist() == [[8.0], [-2.0]]
    # 12 weights, half of them, and a router of 4
    assert part.load == Load(12.0, 10.0, 10.0)
    part.run = "masked"
    assert part(X[None]).tolist() == [[[8.0], [-2.0]]]
    part.asks = "all"
    assert part(X).tolist() == [[5.0], [-1.0]]
    # in two runs of two neurons, of which one runs, and with a bias that is no expert's own
    halves = experts(1, 2.0, bias=10.0, runs=((0, 1), (2, 3)))
    # logits 0, -1 and 0, 1: the first (1 + 0), the second (0 + 0)
    assert halves(X).tolist() == [[12.0], [10.0]]
    halves.asks = "all"
    assert halves(X).tolist() == [[15.0], [9.0]]


def test_prior_approximate_labels_by_hand():
    each = torch.tensor([[[1.0]], [[0.0]], [[2.0]], [[2.0]]])
    # against 5 / 2: squares of 1.5, 2.5, 0.5, 0.5
    assert prior(each, torch.tensor([[5.0]]), 2, 2.0).tolist() == [[0.0, 0.0, 1.0, 1.0]]
    # against 5 / 4 the first is nearest: 0.25, 1.25, 0.75, 0.75
    assert prior(each, torch.tensor([[5.0]]), 1, 4.0).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    # logits 0, -1, 1, 2 against the last two: log(1 + 1/e + e + e^2) less the mean of 1 and 2
    logits, label = ROUTER.T, torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert float(imitation(logits, label)) == pytest.approx(math.log(1 + math.exp(-1) + math.e + math.e**2) - 1.5)
    assert chosen(logits, 2).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_learning_looks_at_the_teacher_and_reaches_the_router():
    part = experts(2, 2.0)
    part.remember()
    # experts that have moved since: the teacher has not
    part.down.weight = nn.Parameter(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    part.router.requires_grad_(True)
    part.run = "learning"
    y = part(X[:1])
    # the forward is that of the chosen two, 2 (2 + 0); labels are against 5 / 2: 1, 0, 2, 0 -> the third and the first
    assert y.tolist() == [[4.0]]
    z = math.log(1 + math.exp(-1) + math.e + math.e**2)
    assert float(part.penalty(0.9).detach()) == pytest.approx(0.5 * (z - 0.5))
    y.sum().backward()
    # straight through: 2 sum_i e_i dp_i with p the softmax, so 2 p_i (e_i - sum_j p_j e_j)
    p = torch.softmax(ROUTER[:, 0], 0)
    e = torch.tensor([1.0, 0.0, 2.0, 0.0])
    torch.testing.assert_close(part.router.grad[:, 0], 2 * p * (e - p @ e))


def test_the_smallest_set_that_reaches_the_mass():
    response = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    # shares 0.4, 0.7, 0.9, 1: two reach 0.7; what fires alone is enough; where nothing fires one is asked for
    assert fired(response, 0.7).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert fired(response, 0.71).tolist()[:2] == [[1, 1, 1, 0], [0, 1, 1, 1]]
    # all of the mass is all that fires at all
    assert fired(response, 1.0).tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def convolution(norm: str = "") -> tuple[nn.Module, Gated]:
    """Three filters of one pixel over two channels: their sum, their difference and minus ten of the first, plus a bias of 1 each."""
    model = nn.Module()
    model.conv, model.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3).eval()
    model.conv.weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-10.0, 0.0]])[..., None, None]
    model.conv.bias.data = torch.ones(3)
    part = Gated(2, 3, 0.6, 0.5, norm, rectified=True)
    part.around("conv", model)
    model.conv = part.eval()
    part.head = nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    part.offset = nn.Parameter(torch.tensor([-2.0, -2.0, 1.0]))
    return model.requires_grad_(False), part


def test_filters_by_hand():
    model, part = convolution()
    # means 0 and log 3: a softmax of 1/4 and 3/4, each times 2, so 2/2 - 2, 2 * 3/2 - 2 and 1: the last two run
    x = torch.tensor([0.0, math.log(3)]).reshape(1, 2, 1, 1).repeat(1, 1, 2, 2)
    torch.testing.assert_close(pooled(x), torch.tensor([[0.5, 1.5]]))
    expected = torch.tensor([0.0, 1 - math.log(3), 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(model.conv(x), expected)
    # 4 pixels of 3 x 2 weights; 2 filters over the one channel that is not all zeros, and a head of 6
    assert part.load == Load(24.0, 4 * 2 * 1 + 6.0, 24 + 6.0)
    part.run = "masked"
    torch.testing.assert_close(model.conv(x), expected)
    # what is positive: 1 + log 3, 0, 1; the first alone has 2.0986 / 3.0986 of it
    part.asks = "labels"
    torch.testing.assert_close(model.conv(x), (1 + x.sum(1, keepdim=True)) * torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1))
    # cross-entropy of logits -1, 1, 1 against 1, 0, 0: each log(1 + e)
    assert float(part.penalty(0.49)) == pytest.approx(3 * math.log(1 + math.e))
    assert part.penalty(0.5) is None


def test_the_gate_is_behind_the_norm():
    model, _ = convolution("norm")
    model.norm.running_mean.fill_(7.0)
    x = torch.tensor([0.0, math.log(3)]).reshape(1, 2, 1, 1).repeat(1, 1, 2, 2)
    y = model.norm(model.conv(x))
    # a filter that does not run gives zeros, whatever the norm makes of a convolution that was not run
    assert torch.equal(y[:, 0], torch.zeros(1, 2, 2))
    torch.testing.assert_close(y[:, 2], torch.full((1, 2, 2), -6.0 / math.sqrt(1 + 1e-5)))


def test_gathered_rows_may_need_nothing_or_all():
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1).requires_grad_(False)
    x = torch.randn(5, 3, 7, 7)
    x[1, 0] = 0
    x[2] = 0
    wanted = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    expected = conv(x) * wanted[..., None, None]
    torch.testing.assert_close(gathered(x, conv, x.flatten(2).any(2), wanted), expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="at least one, at most all"):
        FactorLLM(experts=4, active=5)
    with pytest.raises(ValueError, match="shares above 0"):
        FTWT(mass=0.0)
    with pytest.raises(ValueError, match="norms take their statistics"):
        FTWT(batch=1)
    # attention is no layer of experts, and a convolution in groups stays
    attention = Site("layers.0.self_attn", Sublayer(), {}, (1,), {"part": "attention"})
    assert FactorLLM().place(attention, None).place == {}
    grouped = Site("conv", Conv(), {"weight": TensorId("conv.weight")}, (8, 1, 3, 3), context={"groups": 8})
    change = FTWT().place(grouped, None)
    assert change.place == {}
    assert "stays as it is" in change.notes[0]
