"""Spark Transformer's feed-forward layer on cases small enough to work out by hand; expected numbers are literal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.methods.prune.activation.spark import Spark, Sparks, exact_top, statistical_top

NAMES = {"gate": "gate", "up": "up", "down": "down"}


class Gated(nn.Module):
    def __init__(self, d, h, bias=False):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h, bias), nn.Linear(d, h, bias), nn.Linear(h, d, bias)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def part(keep, layer, predictor=0.5):
    made, model = Sparks(keep, predictor, 1.0, NAMES), nn.ModuleDict({"mlp": layer})
    assert made.fits("mlp", model)
    made.around("mlp", model)
    return made.eval().requires_grad_(False)


def test_statistical_top_by_hand():
    # mean 2, spread sqrt(2); Phi^-1(1 - 0.5) = 0: what is above the mean, less the mean
    row = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    assert statistical_top(row, 0.5).tolist() == [[0.0, 0.0, 0.0, 1.0, 2.0]]
    # Phi^-1(0.8413447) = 1: above 2 + sqrt(2)
    found = statistical_top(row, 1 - 0.8413447460685429)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 0, 0, 2 - math.sqrt(2)]]))
    # all alike: no spread, and none is above the mean; a single one; one that is far louder than all others
    assert not statistical_top(torch.full((2, 7), 3.0), 0.1).any()
    assert statistical_top(torch.tensor([[5.0]]), 0.1).tolist() == [[0.0]]
    loud = torch.zeros(1, 100)
    loud[0, 3] = 1e4
    assert statistical_top(loud, 0.08).nonzero().tolist() == [[0, 3]]
    # with nothing left out all but the least run
    assert statistical_top(row, 1.0).tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]]
    # of normal numbers of any mean and spread, k of n
    draw = torch.randn(64, 20000, generator=torch.Generator().manual_seed(0)) * 7 - 30
    assert abs(float((statistical_top(draw, 0.08) > 0).float().mean()) - 0.08) < 0.001
    assert statistical_top(draw.bfloat16(), 0.08).dtype == torch.bfloat16


def test_exact_top_by_hand():
    row = torch.tensor([[5.0, -1.0, 3.0, 4.0]])
    assert exact_top(row, 0.5).tolist() == [[2.0, 0.0, 0.0, 1.0]]
    assert exact_top(row, 0.01).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert exact_top(row, 1.0).tolist() == [[6.0, 0.0, 4.0, 5.0]]


def test_gradients_pass_where_neurons_run():
    row = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    statistical_top(row, 0.5)[0, 4].backward()
    # 4 - mean: 1 - 1/5 for itself, -1/5 for the others
    torch.testing.assert_close(row.grad, torch.tensor([[-0.2, -0.2, -0.2, -0.2, 0.8]]))


def test_a_layer_by_hand():
    # two inputs, three neurons: scores x1 (1, 2, 3), times x2 (1, 10, 100), summed into the first output
    layer = Gated(2, 3)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0, 9], [2, 9], [3, 9]]))
        layer.up.weight.copy_(torch.tensor([[9.0, 1], [9, 10], [9, 100]]))
        layer.down.weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
    spark = part(0.5, layer)
    # x1 = 1: mean 2, so only the third is above, by 1: 1 * 100 x2; columns of 9 are not read
    x = torch.tensor([[[1.0, 2.0]]])
    assert spark(x).tolist() == [[[200.0, 0.0]]]
    # x1 = -2: scores -2, -4, -6, the first is above the mean by 2
    both = torch.tensor([[[1.0, 2.0], [-2.0, 3.0], [0.0, 5.0]]])
    assert spark(both).tolist() == [[[200.0, 0.0], [6.0, 0.0], [0.0, 0.0]]]
    # an exact top-k of 3 x 0.5, rounded to the even 2, above the third
    spark.asks = "labels"
    assert spark(x).tolist() == [[[1 * 20.0 + 2 * 200.0, 0.0]]]
    spark.asks = "all"
    assert torch.equal(spark(both), layer(both))
    # multiplications: predictor 3 x 1, and each that runs reads up's 2 and down's 2; two inputs of four ran one neuron each
    spark.forget()
    spark.asks = "router"
    spark(both)
    assert spark.load == pytest.approx((18.0, 3 + 4 * 2 / 3, 15.0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_reads_what_many_are_given(dtype, bias):
    torch.manual_seed(0)
    layer = Gated(37, 130, bias)
    # an input that is loud, one that is dead, a neuron that is dead
    with torch.no_grad():
        layer.gate.weight[:, 3] *= 30
        layer.gate.weight[:, 5] = 0
        layer.down.weight[:, 7] = 0
    spark = part(0.1, layer.to(dtype), predictor=0.4)
    x = torch.randn(1, 9, 37).to(dtype)
    x[0, 4] = 0
    many = spark(x)
    one = torch.cat([spark(some) for some in x.split(1, 1)], 1)
    assert torch.isfinite(many).all()
    torch.testing.assert_close(one, many, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_what_the_gate_said_is_rehearsed():
    torch.manual_seed(0)
    spark, x = part(0.2, Gated(8, 20)), torch.randn(2, 5, 8)
    spark.run = "learning"
    spark.remember()
    spark(x)
    first = float(spark.error)
    # the predictor sees half of the inputs: about half of the size is missing
    assert 0.2 < first < 0.9 and float(spark.penalty(0.0)) == first
    # a gate that said nothing of the other half is met in full
    with torch.no_grad():
        spark.gate.weight[:, 4:] = 0
    spark.remember()
    spark(x)
    assert float(spark.error) < 1e-12


def test_knobs_that_make_no_sense():
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"predictor": 0.0}, {"predictor": 1.0}, {"steps": 0}, {"rehearse": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Spark(**wrong)
