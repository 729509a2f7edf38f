"""PTQ1.61 by hand: which columns are salient, what one bit holds, what learns and what stays. Expected numbers in the file."""

from __future__ import annotations

import pytest
import torch

from laconic.core.site import Linear, Site, TensorId
from laconic.core.statistic import Peaks
from laconic.kernels.angle import SquaredAndAngle
from laconic.methods.quantize.grid.apart import Apart
from laconic.methods.quantize.grid.signs import Flipping, Signs
from laconic.methods.quantize.restore.restorative import Restorative
from laconic.methods.quantize.round.ptq161 import PTQ161, Salient, binarized, salient
from laconic.methods.quantize.train.scales import Scales

SITE = Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (2, 5))
# columns 1 and 3 are the loudest; of the others the means are 2 and -1, and the mean distances from them 4/3 and 2
WEIGHT = torch.tensor([[1.0, 9.0, 1.0, -6.0, 4.0], [-4.0, 3.0, 1.0, 15.0, 0.0]])
PEAKS = torch.tensor([1.0, 5.0, 2.0, 8.0, 0.5])


def made(share: float = 0.4) -> Apart:
    (form,) = PTQ161()(SITE, {"weight": WEIGHT}, {Peaks(): PEAKS}, Salient(share)).hold.values()
    return form


def test_the_loudest_columns_are_salient_and_of_equal_ones_the_first():
    assert salient(PEAKS, 2).tolist() == [1, 3]
    assert salient(torch.tensor([2.0, 3.0, 3.0, 3.0]), 2).tolist() == [1, 2]
    assert salient(PEAKS, 0).tolist() == []


def test_one_bit_is_the_mean_and_the_mean_distance_from_it():
    up, alpha, mu = binarized(torch.tensor([[1.0, 1.0, 4.0], [-4.0, 1.0, 0.0]]))
    assert up.tolist() == [[False, False, True], [False, True, True]]
    torch.testing.assert_close(alpha, torch.tensor([4 / 3, 2.0]))
    assert mu.tolist() == [2.0, -1.0]
    # a row of one value is held exactly
    up, alpha, mu = binarized(torch.full((1, 3), 5.0))
    assert (alpha.item(), mu.item()) == (0.0, 5.0)


def test_the_whole_form():
    form = made()
    assert isinstance(form, Apart) and form.columns.tolist() == [1, 3]
    held = form.dense()
    # salient: 4 bits between -6 and 9 in steps of 1, between 0 and 15 in steps of 1
    assert held[:, [1, 3]].tolist() == [[9.0, -6.0], [3.0, 15.0]]
    torch.testing.assert_close(held[:, [0, 2, 4]], torch.tensor([[2 / 3, 2 / 3, 10 / 3], [-3.0, 1.0, 1.0]]), rtol=4e-3, atol=0)
    x = torch.randn(4, 5)
    torch.testing.assert_close(form.matmul(x), x @ held.T, rtol=1e-5, atol=1e-5)
    # signs 2 x 1 byte, scale and mean of two rows, factors of three columns; codes 2 x 1 byte, scales and zeros of two rows; two numbers
    assert form.nbytes == (2 + 8 + 6) + (2 + 4 + 2) + 8 == PTQ161().stored(SITE, Salient(0.4))


def test_without_inputs_the_largest_weights_are_salient_and_without_salient_columns_all_is_in_signs():
    change = PTQ161()(SITE, {"weight": WEIGHT}, {Peaks(): torch.zeros(5)}, Salient(0.4))
    (form,) = change.hold.values()
    assert form.columns.tolist() == [1, 3] and "no input was seen" in change.notes[0]
    assert isinstance(made(0.0), Signs)
    with pytest.raises(ValueError, match="less than all"):
        Salient(1.0)


def test_scales_learn_and_signs_and_codes_stay():
    form = made()
    soft = Scales().soften(form, WEIGHT)
    parameters = dict(soft.named_parameters())
    assert {name.rpartition(".")[2] for name in parameters} == {"step"} and "step" in dict(Scales().rates)
    with torch.no_grad():
        parameters["rest.alpha.step"].fill_(2.0).log_()
        parameters["rest.by_row.step"].copy_(torch.tensor([[1.0], [3.0]]).log())
        parameters["rest.by_column.step"].copy_(torch.tensor([1.0, 1.0, 0.5]).log())
    held = soft.harden().dense()
    # (scale s + mean) times both corrections: row 0 has scale 8/3 about 2, row 1 has 4 about -1
    expected = torch.tensor([[2 - 8 / 3, 2 - 8 / 3, (2 + 8 / 3) / 2], [3 * -5.0, 3 * 3.0, 3 * 3.0 / 2]])
    torch.testing.assert_close(held[:, [0, 2, 4]], expected, rtol=8e-3, atol=8e-3)
    assert torch.equal(held[:, [1, 3]], form.dense()[:, [1, 3]])
    torch.testing.assert_close(soft.dense(), held, rtol=1e-6, atol=1e-6)


def test_signs_are_exchanged_one_by_one():
    coded = made(0.0).coded()
    before = coded.dense().clone()
    # row 0 has scale 3.76 about 1.8, row 1 has 4.8 about 3: nearest to 0 is the lower sign, nearest to 9 the upper
    codes, weights = coded.nearest(torch.tensor([1, 7]), torch.tensor([[0.0], [9.0]]))
    assert codes.tolist() == [0, 1]
    coded.exchange(torch.tensor([1, 7]), codes)
    after = coded.harden().dense()
    torch.testing.assert_close(after.reshape(-1)[[1, 7]], weights.detach()[:, 0])
    changed = (after != before).reshape(-1).nonzero()[:, 0].tolist()
    assert changed == [1, 7]


def test_a_weight_near_the_middle_flips_first():
    form = Signs.of((1, 2), torch.tensor([[True, True]]), torch.ones(1), torch.zeros(1), torch.ones(2))
    soft = Flipping(form, torch.tensor([[0.1, 0.9]]))
    torch.testing.assert_close(soft.position.detach(), torch.tensor([[0.05, 0.45]]))
    with torch.no_grad():
        soft.position.sub_(0.2)
    assert soft.harden().dense().tolist() == [[-1.0, 1.0]]


def test_length_and_angle_by_hand():
    output, target = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
    # mean squared error 1, cosine 24/25
    torch.testing.assert_close(SquaredAndAngle()(output, target, None), 1 - torch.tensor(0.96).log())
    assert float(SquaredAndAngle(angle=0.0)(output, target, None)) == 1.0


def test_a_correction_is_rounded_to_what_is_held():
    form = made()
    soft = Restorative(rank=1, alpha=1.0).soften(form, WEIGHT)
    assert torch.equal(soft.dense(), form.dense())
    with torch.no_grad():
        for name, p in soft.named_parameters():
            if name.endswith((".a", ".b")):
                p.copy_(torch.ones_like(p) if name.endswith(".a") else torch.tensor([[0.0], [-3.0]]))
    moved = soft.dense()
    torch.testing.assert_close(moved, form.dense() + torch.tensor([[0.0], [-3.0]]))
    again = soft.harden()
    # -3, 1, 1 less 3 lie below the row's mean of -1, all in the lower sign; the salient 3 and 15 become 0 and 12
    torch.testing.assert_close(again.dense()[1], torch.tensor([-3.0, 0.0, -3.0, 12.0, -3.0]), rtol=4e-3, atol=0)
    assert torch.equal(again.dense()[0], form.dense()[0])
