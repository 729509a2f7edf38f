"""Rotations, scales and rounded inputs by hand: 8 x 8 or less, expected numbers in the file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laconic.aligning import Edit, edited
from laconic.core.menu import Budget, Cost, Damage, Menu, Row
from laconic.core.packed import Dense, restore
from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Gram
from laconic.core.transform import Stretched, Turned
from laconic.kernels.grids import Grid
from laconic.kernels.hadamard import hadamard, paley, unhadamard
from laconic.kernels.inputs import rounded
from laconic.kernels.scan import recurrence
from laconic.methods.quantize.rotate.hadamard import Hadamard, Rotated
from laconic.methods.quantize.rotate.mambaquant import MambaQuant, klt_rotation, smoothing, unscaled
from laconic.methods.quantize.rotate.mixer import Mixer
from laconic.methods.quantize.round.inputs import Fed, Inputs, WeightAndInputs
from laconic.methods.quantize.round.rtn import RTN
from laconic.methods.search.allocate.uniform import Uniform, by_level

HALF = 0.5**0.5


def test_hadamard_of_powers_of_two_is_sylvesters():
    x = torch.tensor([1.0, 2, 3, 4])
    assert hadamard(x).tolist() == [5.0, -1.0, -2.0, 0.0]
    torch.testing.assert_close(hadamard(torch.tensor([3.0, 1.0])), torch.tensor([4 * HALF, 2 * HALF]))
    assert hadamard(torch.tensor([7.0])).tolist() == [7.0]


@pytest.mark.parametrize("n", [12, 20, 24, 28, 36, 40, 48, 60, 192, 384, 768])
def test_hadamard_matrices_of_other_widths_have_entries_of_one_size(n):
    matrix = hadamard(torch.eye(n).double())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(unhadamard(matrix), torch.eye(n).double(), rtol=0, atol=1e-12)


def test_widths_without_a_hadamard_matrix_have_hartleys():
    # cos + sin of 2 pi i j / 3, over the root of 3
    a, b = math.cos(2 * math.pi / 3) + math.sin(2 * math.pi / 3), math.cos(2 * math.pi / 3) - math.sin(2 * math.pi / 3)
    expected = torch.tensor([[1, 1, 1], [1, a, b], [1, b, a]], dtype=torch.float64) / 3**0.5
    torch.testing.assert_close(hadamard(torch.eye(3).double()), expected, rtol=0, atol=1e-12)
    assert paley(6) is None and paley(92) is None
    for n in (1, 5, 6, 37, 70):
        matrix = hadamard(torch.eye(n).double())
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n).double(), rtol=0, atol=1e-12)
        assert float(matrix.abs().max()) <= (2 / n) ** 0.5 + 1e-12


def test_inputs_round_by_a_scale_of_each_token():
    # 3 bits: -3 to 3; scales 1 and 2
    x = torch.tensor([[1.2, -3.0, 0.4], [6.0, 1.2, 0.9], [0.0, 0.0, 0.0]])
    assert rounded(x, 3).tolist() == [[1, -3, 0], [6, 2, 0], [0, 0, 0]]
    # one scale for both rows: 2
    assert rounded(x[:2][None], 3, axes=2).tolist() == [[[2, -4, 0], [6, 2, 0]]]
    y = x.clone().requires_grad_(True)
    rounded(y, 3).sum().backward()
    assert y.grad.tolist() == torch.ones(3, 3).tolist()


def test_forms_that_round_and_turn_their_inputs():
    weight = torch.tensor([[1.0, 2.0]])
    x = torch.tensor([[3.0, 1.0]])
    # 2 bits: -1, 0, 1 times 3 -> (3, 0)
    assert Fed(Dense(weight), 2).matmul(x).tolist() == [[3.0]]
    # turned: (4, 2) / sqrt 2 -> (4, 4) / sqrt 2 in 2 bits, for 0.5 of the larger goes to the even 0 and 2 / 4 is 0.5: (4, 0) / sqrt 2;
    # the weight turned is (3, -1) / sqrt 2, so 12 / 2
    turned = Rotated(Fed(Dense(torch.tensor([[3.0, -1.0]]) * HALF), 2))
    torch.testing.assert_close(turned.dense(), weight)
    torch.testing.assert_close(turned.matmul(x), torch.tensor([[6.0]]))
    torch.testing.assert_close(turned.feed(x), torch.tensor([[2.0, 2.0]]))
    again = restore(turned.describe(), turned.tensors())
    assert torch.equal(again.matmul(x), turned.matmul(x)) and again.nbytes == 8
    site = Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (1, 2))
    level = WeightAndInputs(Grid(8, None, symmetric=True), 2)
    change = Hadamard(Inputs(RTN()))(site, {"weight": weight}, {}, level)
    assert change.hold[TensorId("layer.weight")].matmul(x).item() == pytest.approx(6.0, rel=0.02)


class Wants(RTN):
    """A quantizer that keeps the Gram that it is shown."""

    wants = (Gram(),)

    def several(self, site, weights, stats, levels):
        self.seen.append(stats[Gram()])
        return super().several(site, weights, stats, levels)


def test_what_turns_the_inputs_turns_their_gram():
    inner = Wants()
    object.__setattr__(inner, "seen", [])
    site = Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (1, 2))
    Hadamard(inner)(site, {"weight": torch.ones(1, 2)}, {Gram(): torch.tensor([[5.0, 4], [4, 5]])}, Grid(8, None))
    torch.testing.assert_close(inner.seen[0], torch.tensor([[9.0, 0], [0, 1]]))


def test_klt_gives_all_channels_one_variance_where_hadamard_gives_nine_to_one():
    moment = torch.tensor([[5.0, 4], [4, 5]])
    alone = hadamard(torch.eye(2).double())
    torch.testing.assert_close((alone.T @ moment.double() @ alone).diagonal(), torch.tensor([9.0, 1.0]).double())
    both = klt_rotation(moment)
    torch.testing.assert_close((both.T @ moment.double() @ both).diagonal(), torch.tensor([5.0, 5.0]).double())
    # diag(9, 1): basis e2, e1 by rising eigenvalues, then Hadamard
    torch.testing.assert_close(klt_rotation(torch.diag(torch.tensor([9.0, 1]))), torch.tensor([[HALF, -HALF], [HALF, HALF]]).double())
    # nothing seen
    torch.testing.assert_close(klt_rotation(torch.zeros(2, 2)).abs(), torch.full((2, 2), HALF).double())


def test_smoothing_and_what_a_norm_hides():
    factors = smoothing(torch.tensor([4.0, 0.0, 9.0, 1.0]), torch.tensor([1.0, 2.0, 0.0, 4.0]))
    assert factors.tolist() == [2.0, 1.0, 1.0, 0.5]
    seen = unscaled(torch.tensor([[8.0, 6, 0], [6, 9, 0], [0, 0, 0]]), torch.tensor([2.0, 3.0, 0.0]))
    torch.testing.assert_close(seen, torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="klt"):
        MambaQuant(basis="random")


def test_moves_of_a_tensor():
    value = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    quarter = Turned(torch.tensor([[0.0, 1], [-1, 0]]))
    # rows 2 and 0 as a pair (5, 1), (6, 2): x R = (-x1, x0)
    rows = torch.tensor([[2], [0]])
    assert edited(value, Edit(0, rows, quarter, reads=False)).tolist() == [[5, 6], [3, 4], [-1, -2]]
    assert edited(value, Edit(1, torch.tensor([[0], [1]]), quarter, reads=True)).tolist() == [[-2, 1], [-4, 3], [-6, 5]]
    factors = Stretched(torch.tensor([2.0, 4.0]))
    assert edited(value, Edit(0, rows, factors, reads=False)).tolist() == [[4, 8], [3, 4], [10, 12]]
    assert edited(value, Edit(1, torch.tensor([[0], [1]]), factors, reads=True)).tolist() == [[0.5, 0.5], [1.5, 1], [2.5, 1.5]]
    assert value.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_a_recurrence_and_its_gradient():
    decay, drive, start = torch.full((3, 1), 0.5), torch.ones(3, 1), torch.tensor([2.0])
    assert recurrence(decay, drive, start).flatten().tolist() == [2.0, 2.0, 2.0]
    given = [x.double().requires_grad_(True) for x in (torch.rand(4, 2), torch.rand(4, 2), torch.rand(2))]
    assert torch.autograd.gradcheck(recurrence, given)


class Projections(nn.Module):
    """What a Mixer takes over: one channel of width 1 with one state, all projections 1."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.x_proj = nn.Linear(1, 2, bias=False), nn.Linear(1, 3, bias=False)
        self.dt_proj, self.out_proj = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)
        self.conv1d, self.act = nn.Conv1d(1, 1, 1, bias=False), nn.Identity()
        self.A_log, self.D = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.ones(1))
        for parameter in self.parameters():
            parameter.data.fill_(1.0)
        self.A_log.data.fill_(0.0)
        self.dt_proj.bias.data.fill_(0.0)
        self.layer_idx, self.time_step_rank, self.ssm_state_size, self.conv_kernel_size = 0, 1, 1, 1


def test_an_open_mixer_by_hand():
    """x = 1, 1: step softplus(1) = 1.3133, decay e^-1.3133 = 0.26894, drive 1.3133; h = 1.3133, 1.66646; y = h + 1; silu(1) = 0.731059."""
    x = torch.ones(1, 2, 1)
    mixer = Mixer()
    mixer.over(Projections())
    out = mixer(x).detach().flatten().tolist()
    assert out == pytest.approx([2.313262 * 0.731059, 2.666455 * 0.731059], rel=1e-5)
    # the gate's projection halved, the factor put right within the SiLU, what reads behind it doubled
    scaled = Mixer(scaled=True)
    scaled.over(Projections())
    scaled.in_proj.weight.data[1] = 0.5
    scaled.out_proj.weight.data[:] = 2.0
    assert scaled(x).detach().flatten().tolist() != pytest.approx(out, rel=1e-2)
    scaled.gate_scale.fill_(2.0)
    assert scaled(x).detach().flatten().tolist() == pytest.approx(out, rel=1e-6)
    # a token that the mask leaves out leaves no trace
    assert mixer(x, attention_mask=torch.tensor([[0, 1]])).detach().flatten().tolist()[1] == pytest.approx(out[0], rel=1e-5)
    assert Mixer.restore(Mixer(scaled=True, turned=True, bits=6).describe()).describe() == {
        "part": "quantize.rotate.mixer.Mixer", "scaled": True, "turned": True, "bits": 6,
    }  # fmt: skip


def test_uniform_takes_methods_that_share_the_tensors_out_as_one():
    def row(name: str, method: str, bits: int) -> Row:
        level = {"weight": {"bits": bits, "group": None}, "inputs": 8}
        return Row(frozenset({name}), method, level, Cost(bits), Damage(0.0, "nats/token", "here"), name)

    menu = Menu(tuple(row(name, method, bits) for name, method in (("a", "plain"), ("b", "turned")) for bits in (8, 4)))
    plan = Uniform()(menu, Budget(bytes=15), judge=None, rng=torch.Generator(), log=lambda _: None)
    assert [(r.site, r.level["weight"]["bits"]) for r in plan.rows] == [("a", 4), ("b", 4)]
    # a tensor that two of them cover is not shared out
    assert by_level(Menu((*menu.rows, row("a", "turned", 8)))).keys() == {'turned{"inputs": 8, "weight": {"bits": 8, "group": null}}'}
