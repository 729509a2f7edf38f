"""MatFormer and Mix'n'Match, worked by hand: slices in order of worth, narrower layers, granularities drawn, and their order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laconic.core.packed import Dense, Joined, Transposed, restore
from laconic.core.site import Conv, Group, IndexMap, Linear, Member, Norm, Site, TensorId
from laconic.core.transform import Lesson
from laconic.kernels.grids import Grid
from laconic.kernels.losses import SquaredError
from laconic.methods.nest.order.mixnmatch import MixNMatch
from laconic.methods.nest.width.matformer import MatFormer, Numbers, drawn
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.round.rtn import RTN
from laconic.nesting import counts_of, held, laid, slots_of, unfit
from laconic.tuning import tune


def member(
    name: str, axis: int, shape: tuple[int, ...], index: IndexMap | None = None, bias: bool = False, transposed: bool = False
) -> Member:
    tensors = {"weight": TensorId(f"{name}.weight")} | ({"bias": TensorId(f"{name}.bias")} if bias else {})
    return Member(Site(name, Linear(), tensors, shape, transposed=transposed), axis, index or IndexMap(shape[axis]))


def no_trial(counts, names):
    raise AssertionError("nothing is measured")


def test_slices_side_by_side_and_the_first_alone_is_a_smaller_matrix() -> None:
    w = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    rows, columns = Joined.of(w, [1, 1, 2], 0), Joined.of(w, [2, 1], 1)
    assert (rows.parts, rows.shape, columns.parts, columns.shape) == (3, (4, 3), 2, (4, 3))
    assert torch.equal(rows.dense(), w) and torch.equal(columns.dense(), w)
    assert rows.first(2).shape == (2, 3) and torch.equal(rows.first(2).dense(), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert columns.first(1).shape == (4, 2) and torch.equal(columns.first(1).dense(), w[:, :2])
    # four bytes a number, those of the first slices alone
    assert (rows.nbytes, rows.first(1).nbytes, columns.first(1).nbytes) == (48, 12, 32)
    assert torch.equal(rows.first(2).matmul(torch.ones(1, 3)), torch.tensor([[6.0, 15]]))
    assert torch.equal(columns.rows(slice(1, 3)), w[1:3])
    assert (
        rows.as_is
        and not Joined([Dense(w), RTN()(member("a", 0, (4, 3)).site, {"weight": w}, {}, Grid(4, None)).hold.popitem()[1]], 0).as_is
    )
    again = restore(columns.describe(), columns.tensors())
    assert torch.equal(again.dense(), w) and again.describe() == columns.describe()
    turned = Transposed(rows)
    assert turned.as_is and torch.equal(turned.dense(), w.T) and turned.first(1).shape == (3, 1)


def test_two_runs_in_one_tensor_have_a_slice_of_each() -> None:
    """gate 1, 2, 3 over up 10, 20, 30: the first two channels are gate 1, 2 over up 10, 20."""
    fused = torch.tensor([[1.0], [2], [3], [10], [20], [30]])
    form = Joined.of(fused, [2, 1], 0, runs=2)
    assert torch.equal(form.dense(), fused)
    assert form.first(1).shape == (4, 1) and form.first(1).dense().flatten().tolist() == [1, 2, 10, 20]
    assert [piece.dense().flatten().tolist() for piece in form.pieces] == [[1, 2, 10, 20], [3, 30]]


def test_how_an_axis_holds_channels() -> None:
    assert laid(member("a", 0, (4, 2)), 4) == (1, 1)
    assert laid(member("a", 1, (2, 6), IndexMap(6, 0, 2)), 3) == (1, 2)
    assert laid(member("a", 0, (6, 2), IndexMap(6, table=((0, 3), (1, 4), (2, 5)))), 3) == (2, 1)
    # heads of q, k and v in turns
    assert laid(member("a", 0, (6, 2), IndexMap(6, table=((0, 2), (1, 3), (4, 5)))), 3) is None
    # a reader of two streams
    assert laid(member("a", 1, (2, 8), IndexMap(8, 0, 1)), 4) is None


def test_the_best_channel_is_first_everywhere() -> None:
    """Worth 2, 5, 1, 5: the order is 1, 3, 0, 2 (ties as they were), in slices of 1, 1 and 2."""
    up, down = member("up", 0, (4, 2), bias=True), member("down", 1, (2, 4))
    group = Group(4, (up, down))
    assert unfit(group, set()) is None
    slots = {slot.tensor: slot for slot in slots_of(group, torch.tensor([2.0, 5, 1, 5]), [1, 2, 4])}
    w = torch.arange(8.0).reshape(4, 2)
    form = held(slots["up.weight"], w)
    assert form.dense().tolist() == [[2, 3], [6, 7], [0, 1], [4, 5]] and [p.shape[0] for p in form.pieces] == [1, 1, 2]
    assert held(slots["up.bias"], torch.tensor([0.0, 1, 2, 3])).first(2).dense().tolist() == [1, 3]
    v = torch.arange(8.0).reshape(2, 4)
    assert held(slots["down.weight"], v).first(2).dense().tolist() == [[1, 3], [5, 7]]
    # the layer computes what it did
    x = torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close((x @ w.T).relu() @ v.T, (x @ form.dense().T).relu() @ held(slots["down.weight"], v).dense().T)


def test_a_weight_that_is_stored_the_other_way_round() -> None:
    slots = slots_of(Group(3, (member("up", 0, (3, 2), transposed=True),)), torch.tensor([1.0, 2, 3]), [1, 3])
    form = held(slots[0], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert form.dense().tolist() == [[3, 2, 1], [6, 5, 4]] and form.first(1).dense().tolist() == [[3], [6]]


def test_what_cannot_be_nested_says_why() -> None:
    norm = Member(Site("norm", Norm(), {"weight": TensorId("norm.weight")}, (4,)), 0, IndexMap(4))
    assert "norm" in (unfit(Group(4, (member("a", 0, (4, 2)), norm)), set()) or "")
    assert "other axis" in (unfit(Group(4, (member("a", 0, (4, 2)),)), {"a.weight"}) or "")
    grouped = Member(Site("c", Conv(), {"weight": TensorId("c.weight")}, (4, 1, 3, 3), context={"groups": 4}), 0, IndexMap(4))
    assert "groups" in (unfit(Group(4, (grouped,)), set()) or "")
    assert "interleaved" in (unfit(Group(3, (member("a", 0, (6, 2), IndexMap(6, table=((0, 2), (1, 3), (4, 5)))),)), set()) or "")


def test_counts_of_channels() -> None:
    assert counts_of(172, (0.125, 0.25, 0.5, 1.0)) == [22, 43, 86, 172]
    assert counts_of(768, (0.1, 1.0)) == [77, 768]
    # too few channels for four sizes
    assert counts_of(3, (0.125, 0.25, 0.5, 1.0)) == [1, 2, 3]
    assert counts_of(1, (0.5, 1.0)) == [1]


def test_granularities_are_drawn_by_their_odds_and_a_step_may_take_all() -> None:
    g = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([drawn(3, (), g) for _ in range(3000)]), minlength=4).tolist()
    assert counts[0] == 0 and all(900 < count < 1100 for count in counts[1:])
    assert {drawn(3, (0.0, 1.0, 0.0), g) for _ in range(20)} == {2}
    assert list(MatFormer(draw="all").prefixes(3, g)) == [1, 2, 3]
    assert all(len(MatFormer().prefixes(4, g)) == 1 for _ in range(9))
    with pytest.raises(ValueError, match="2 granularities where there are 3"):
        MatFormer(odds=(1.0, 1.0)).prefixes(3, g)
    with pytest.raises(ValueError, match="more than 0"):
        MatFormer(odds=(0.0, 0.0))


class _Plain(Lesson):
    """A lesson with nothing of its own."""


def test_an_ordinary_lesson_computes_with_all() -> None:
    state = (g := torch.Generator().manual_seed(3)).get_state()
    assert _Plain(SquaredError(), (), 1).prefixes(4, g) == (4,) and torch.equal(g.get_state(), state)


def test_a_step_moves_the_drawn_prefix_and_no_other_neuron() -> None:
    """y = w[:m] summed, target 1, from zero: squared error (sum - 1)^2; one signed step of 0.1 moves what is in the prefix by 0.1."""

    def moved(lesson: MatFormer) -> list[float]:
        soft = lesson.soften(Joined.of(torch.zeros(1, 3), [1, 1, 1], 1), torch.zeros(1, 3))
        assert soft is not None
        run = lambda i, weights: weights["w"].sum().reshape(1, 1)  # noqa: E731
        tune(run, [torch.ones(1, 1)], {"w": soft}, lesson, generator=torch.Generator().manual_seed(0))
        return [round(v, 4) for v in soft.dense().detach().flatten().tolist()]

    one = {"objective": SquaredError(), "rates": (("weight", 0.1),), "steps": 1, "optimiser": "signed", "decay": "constant"}
    assert moved(MatFormer(odds=(1.0, 0.0, 0.0), **one)) == [0.1, 0.0, 0.0]
    assert moved(MatFormer(odds=(0.0, 1.0, 0.0), **one)) == [0.1, 0.1, 0.0]
    assert moved(MatFormer(draw="all", **one)) == [0.1, 0.1, 0.1]


def test_what_learns_is_what_will_be_stored() -> None:
    value = torch.tensor([[1.0, 0.5]]).to(torch.bfloat16)
    soft = Numbers(Dense(value))
    assert torch.equal(soft.dense(), value.float())
    with torch.no_grad():
        # 1.001 has no place in bf16, whose next number after 1 is 1.0078125
        soft.weight.copy_(torch.tensor([[1.001, 1.005]]))
    assert soft.dense().tolist() == [[1.0, 1.0078125]] and soft.harden().value.dtype is torch.bfloat16
    assert torch.equal(soft.harden().dense(), soft.dense())
    soft.dense().sum().backward()
    assert soft.weight.grad is not None and soft.weight.grad.tolist() == [[1.0, 1.0]]


def test_codes_in_slices_learn_in_their_own_way() -> None:
    w = torch.randn(4, 6)
    pieces = [RTN()(member("a", 0, (2, 6)).site, {"weight": part}, {}, Grid(4, None)).hold.popitem()[1] for part in w.split(2)]
    form = Joined(pieces, 0)
    soft = MatFormer().soften(form, w)
    assert soft is not None and soft.parts == 2 and {n.rpartition(".")[2] for n, _ in soft.named_parameters()} == {"position", "step"}
    hard = soft.harden()
    assert all(isinstance(piece, Grouped) for piece in hard.pieces)
    assert torch.equal(hard.dense(), form.dense()) and torch.equal(soft.first(1).dense(), form.first(1).dense())


def test_layers_widen_from_the_last() -> None:
    parts: dict[str, tuple[int, ...]] = {"a": (1, 1, 2), "b": (1, 1, 2), "c": (1, 1)}
    assert MixNMatch()(parts, no_trial) == ["c", "b", "a", "b", "a"]
    assert MixNMatch(deep=False)(parts, no_trial) == ["a", "b", "c", "a", "b"]
    assert MixNMatch()({"a": (1,)}, no_trial) == [] and MixNMatch()({}, no_trial) == []


def test_sizes_never_fall_over_depth_and_differ_by_one() -> None:
    names = [f"layer{i}" for i in range(5)]
    have: dict[str, int] = dict.fromkeys(names, 1)
    for name in MixNMatch()(dict.fromkeys(names, (8, 8, 8, 8)), no_trial):
        have[name] += 1
        sizes: list[int] = [have[one] for one in names]
        assert sizes == sorted(sizes) and sizes[-1] - sizes[0] <= 1


def _ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x @ up.T).relu() @ down.T


def test_neurons_of_no_worth_may_go() -> None:
    """Two dead neurons last: half the width computes the same."""
    up = torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0]])
    down = torch.tensor([[1.0, 9, 2, 9], [3, 9, 4, 9]])
    group = Group(4, (member("up", 0, (4, 2)), member("down", 1, (2, 4))))
    forms = [held(slot, value).first(1) for slot, value in zip(slots_of(group, up.square().sum(1), [2, 4]), (up, down), strict=True)]
    x = torch.tensor([[2.0, 3]])
    assert torch.equal(_ffn(x, up, down), _ffn(x, forms[0].dense(), forms[1].dense()))
    assert [form.shape for form in forms] == [(2, 2), (2, 2)]
