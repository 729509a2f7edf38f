"""SPA and OBSPA on numbers that can be followed by hand."""

from __future__ import annotations

import pytest
import torch

from laconic.core.score import Unit
from laconic.core.site import Group, IndexMap, Linear, Member, Site, TensorId
from laconic.core.statistic import Gram
from laconic.kernels.obs import removal_cost, without_columns
from laconic.methods.prune.cut.obspa import Obspa
from laconic.methods.prune.cut.spa import Spa, coupled_importance
from laconic.methods.prune.score.magnitude import Magnitude


def site(name: str, *shape: int) -> Site:
    return Site(name, Linear(), {"weight": TensorId(f"{name}.weight")}, shape)


# two channels; up writes them, down reads each by one column
PAIR = Group(2, (Member(site("up", 2, 2), 0, IndexMap(2)), Member(site("down", 1, 2), 1, IndexMap(2))))
# the Hessian of down's inputs and its inverse, 1/3 [[2, -1], [-1, 2]]
GRAM = torch.tensor([[2.0, 1.0], [1.0, 2.0]])


def test_a_channel_is_worth_all_of_its_slices() -> None:
    weights = {"up": torch.tensor([[1.0, -2.0], [3.0, 0.0]]), "down": torch.tensor([[-4.0, 5.0]])}
    # channel 0: 1 + 2 + 4 = 7 in three entries, channel 1: 3 + 0 + 5 = 8; divided by their mean 7.5
    assert Spa(Magnitude(), normalize=False).worth(PAIR, weights, {}).tolist() == [7.0, 8.0]
    assert Spa(Magnitude(), over="mean", normalize=False).worth(PAIR, weights, {}).tolist() == pytest.approx([7 / 3, 8 / 3])
    assert Spa(Magnitude()).worth(PAIR, weights, {}).tolist() == pytest.approx([7 / 7.5, 8 / 7.5])


def test_slices_are_found_through_the_index_map() -> None:
    # three canonical channels, of which the member has the last two, two columns each, the second pair first
    member = Member(site("down", 1, 4), 1, IndexMap(4, table=((), (2, 3), (0, 1))))
    score = Magnitude()(Unit(member.site, torch.tensor([[1.0, 2.0, 3.0, 4.0]])), {})
    assert coupled_importance(3, [(member, score)], normalize=False).tolist() == [0.0, 7.0, 3.0]
    assert coupled_importance(3, [(member, score)], mean=True, normalize=False).tolist() == [0.0, 3.5, 1.5]


def test_spa_leaves_what_stays() -> None:
    weights = {"up": torch.eye(2), "down": torch.tensor([[3.0, 4.0]])}
    change = Spa(Magnitude())(PAIR, weights, {}, (0,))
    assert change.cut == ((PAIR, (0,)),)
    assert {name.name: value.tolist() for name, value in change.fold.items()} == {"down.weight": [[3.0, 0.0]]}


def test_the_surgeon_s_cost_and_correction() -> None:
    weight = torch.tensor([[3.0, 4.0]])
    # w^2 / [H^-1]_jj: 9 / (2/3) and 16 / (2/3)
    assert removal_cost(weight, GRAM, 0.0).tolist()[0] == pytest.approx([13.5, 24.0])
    # 3 - 4 * (-1/3) / (2/3) = 5
    new, used = without_columns(weight, GRAM, torch.tensor([False, True]), 0.0)
    assert new.tolist()[0] == pytest.approx([5.0, 0.0]) and used == 0.0
    # the error that is left: d = (2, -4), d H d = 8 - 16 + 32 = 24, as the cost said
    delta = new - weight
    assert float((delta @ GRAM * delta).sum()) == pytest.approx(24.0)


def test_both_forms_of_the_correction_agree() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    gram, weight = (x.T @ x).double(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    gone = torch.tensor([False, True, False, False, True, True])
    inverse = torch.linalg.inv(gram)
    moved = weight.double() - weight.double()[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    new, _ = without_columns(weight, gram.float(), gone, 0.0)
    assert torch.allclose(new[:, ~gone], moved[:, ~gone].float(), atol=1e-4)
    assert not new[:, gone].any()


def test_obspa_moves_what_reads_the_channel() -> None:
    stats = {"down": {Gram(): GRAM}}
    weights = {"up": torch.eye(2), "down": torch.tensor([[3.0, 4.0]])}
    cut = Obspa(damping=0.0, normalize=False)
    assert [s.name for s in cut.sites(PAIR)] == ["down"]
    assert cut.worth(PAIR, weights, stats).tolist() == pytest.approx([13.5, 24.0])
    change = cut(PAIR, weights, stats, (0,))
    assert change.fold[TensorId("down.weight")].tolist()[0] == pytest.approx([5.0, 0.0])
    assert change.notes == ()


def test_dead_and_singular() -> None:
    # the second channel never fires: removing it costs nothing and moves nothing
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    weight = torch.tensor([[3.0, 4.0]])
    assert removal_cost(weight, gram, 0.0).tolist()[0] == pytest.approx([36.0, 0.0])
    assert without_columns(weight, gram, torch.tensor([False, True]), 0.0)[0].tolist() == [[3.0, 0.0]]
    # two channels that are one: the other takes over all of it, and removal costs nothing
    twin = torch.ones(2, 2)
    new, used = without_columns(weight, twin, torch.tensor([False, True]), 1e-6)
    assert new.tolist()[0] == pytest.approx([7.0, 0.0], abs=1e-4) and used == 1e-6
    assert float(removal_cost(weight, twin, 1e-6).max()) < 1e-3
    # no channel that stays has ever fired: damping is raised and nothing becomes NaN
    new, used = without_columns(weight, torch.zeros(2, 2), torch.tensor([False, True]), 0.0)
    assert new.tolist() == [[3.0, 0.0]] and used > 0
