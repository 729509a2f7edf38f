"""Vector codebooks by hand: packing, k-means of two heaps, columns that push errors, tables solved for, codes exchanged one by one."""

from __future__ import annotations

import pytest
import torch

from laconic.core.packed import Soft, Sum, Transposed, restore
from laconic.core.site import Conv, Linear, Site, TensorId
from laconic.core.statistic import Gram
from laconic.kernels.bits import pack, unpack
from laconic.kernels.grids import Grid
from laconic.kernels.levels import Levels
from laconic.kernels.obs import inverse_factor, round_vectors
from laconic.kernels.vectors import Book, Vectors, assembled, cut, kmeans, laid, nearest, nearest_sums, refit
from laconic.methods.quantize.grid.apart import Apart
from laconic.methods.quantize.grid.grouped import Grouped
from laconic.methods.quantize.grid.levels import Leveled
from laconic.methods.quantize.grid.vectors import Vectored, inside
from laconic.methods.quantize.round.vptq import VPTQ, Codebooks
from laconic.methods.quantize.train.pv import PV, Revised, exchanged
from laconic.methods.quantize.train.straight import Straight


def site(n: int, m: int) -> Site:
    return Site("a", Linear(), {"weight": TensorId("a.weight")}, (n, m))


def draw(n: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


def test_long_indices_are_packed_as_short_ones_are():
    """0xabc and 0x123 of 12 bits: the low bits first, bc, then a below the 3, then 12."""
    assert pack(torch.tensor([[0xABC, 0x123]]), 12).tolist() == [[0xBC, 0x3A, 0x12]]
    for bits in (9, 11, 16):
        codes = torch.randint(0, 2**bits, (3, 7), generator=torch.Generator().manual_seed(bits))
        stored = pack(codes, bits)
        assert stored.shape == (3, -(-7 * bits // 8)) and unpack(stored, bits, 7).tolist() == codes.tolist()


def test_a_form_of_known_vectors():
    """5 rows in vectors of 2 along the rows, the last half empty; 3 columns; entries (1, 2) and (-1, 0.5)."""
    codes, table = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]]), torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    form = Vectored.of((5, 3), Vectors(2, 1), [codes], [table], None)
    wanted = [[1, -1, 1], [2, 0.5, 2], [-1, -1, 1], [0.5, 0.5, 2], [1, 1, -1]]
    assert form.dense().tolist() == wanted
    assert form.rows(torch.tensor([3, 0])).tolist() == [wanted[3], wanted[0]] and form.rows(slice(1, 3)).tolist() == wanted[1:3]
    assert form.matmul(torch.tensor([[1.0, 10.0, 100.0]])).tolist() == [[91, 207, 89, 205.5, -89]]
    # a byte for the indices of each run of rows, four numbers of two bytes
    assert form.codes.tolist() == [[2], [3], [4]] and form.nbytes == 3 + 8
    # a second table on top, and a factor a row: (1, 2) + (0, .25) in the first run's first column
    more = [codes, torch.tensor([[1, 0, 0]] * 3)], [table, torch.tensor([[0.0, 0.0], [0.0, 0.25]])]
    both = Vectored.of((5, 3), Vectors(2, 1, 1, True), *more, torch.tensor([1.0, 2.0, 1.0, 1.0, 4.0]))
    assert both.dense()[:, 0].tolist() == [1.0, 4.5, -1.0, 0.75, 4.0]
    assert both.nbytes == 2 * (3 + 8) + 10 and torch.equal(restore(both.describe(), both.tensors()).dense(), both.dense())


def test_small_matrices_have_small_tables():
    # 64 * 64 / 4 vectors, an entry for 16 of them: 64
    assert Vectors(4, 8).fitted(64, 64).index == 6 and Vectors(4, 8, 5).fitted(64, 64).residual == 5
    assert Vectors(4, 8).fitted(256, 256).index == 8 and Vectors(4, 8, 8).fitted(1, 3) == Vectors(4, 1, 1)
    # 16 runs of 64 indices of 6 bits, 64 * 4 numbers of two bytes
    assert Vectored.bytes_of(64, 64, Vectors(4, 8)) == 16 * 48 + 512


def test_vectors_stand_along_rows():
    weight = torch.arange(10.0).reshape(5, 2)
    assert cut(weight, 2).tolist() == [[[0, 2], [1, 3]], [[4, 6], [5, 7]], [[8, 0], [9, 0]]]
    assert torch.equal(laid(cut(weight, 2), 5), weight)


def test_kmeans_of_two_heaps():
    vectors = torch.tensor([[0.0, 0.0], [0.0, 1.0], [4.0, 4.0], [4.0, 5.0]])
    table = kmeans(vectors, torch.ones(4, 2), 2, torch.Generator().manual_seed(0))
    assert sorted(table.tolist()) == [[0.0, 0.5], [4.0, 4.5]]
    # the second of each heap counts three times
    heavy = kmeans(vectors, torch.tensor([[1.0, 1.0], [3.0, 3.0]] * 2), 2, torch.Generator().manual_seed(0))
    assert sorted(heavy.tolist()) == [[0.0, 0.75], [4.0, 4.75]]
    # what is left over goes to the second table
    assert [
        code.tolist() for code in nearest_sums(vectors, [torch.tensor([[0.0, 0.0], [4.0, 4.0]]), torch.tensor([[0.0, 1.0], [0, 0]])])
    ] == [
        [0, 0, 1, 1],
        [1, 0, 1, 0],
    ]


def test_nearest_counts_each_number_as_it_weighs():
    x, table = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert nearest(x, table).tolist() == [0] and nearest(x, table, torch.tensor([[1.0, 0.0]])).tolist() == [1]


def test_columns_push_their_errors_onto_the_others():
    """Two columns that always agree. (2.4, .4) goes to (2, 0), and (2.4, .4) + (.4, .4) to (3, 1), by itself to (2, 0)."""
    weight, gram = torch.tensor([[2.4, 2.4], [0.4, 0.4]]), torch.ones(2, 2)
    books = [Book(torch.arange(2), [torch.tensor([[2.0, 0.0], [3.0, 1.0]])])]
    (codes,) = round_vectors(weight, inverse_factor(gram, 1e-4), books, torch.arange(2))
    assert codes[0].tolist() == [[0, 1]]
    (backward,) = round_vectors(weight, inverse_factor(gram, 1e-4), books, torch.tensor([1, 0]))
    assert backward[0].tolist() == [[1, 0]]
    (alone,) = round_vectors(weight, inverse_factor(torch.eye(2)), books, torch.arange(2))
    assert alone[0].tolist() == [[0, 0]]


def test_tables_are_solved_for():
    """One entry for both columns of a row (1, 3). Inputs of their own, one three times as loud: (3 * 1 + 3) / 4. Inputs that agree: only
    the sum of both errors counts, so 2."""
    weight, codes = torch.tensor([[1.0, 3.0]]), [[torch.zeros(1, 2, dtype=torch.int64)]]

    def found(gram: torch.Tensor, scale: torch.Tensor | None = None) -> float:
        books = refit([Book(torch.arange(2), [torch.zeros(1, 1)])], codes, weight, [(slice(0, 1), gram)], scale, 0.0)
        return float(assembled(books, codes, scale, 1)[0, 0])

    assert found(torch.diag(torch.tensor([3.0, 1.0]))) == 1.5 and found(torch.ones(2, 2)) == 2.0
    assert found(torch.ones(2, 2), torch.tensor([4.0])) == 2.0


def test_outliers_have_a_table_of_their_own():
    weight, gram = draw(32, 40), torch.eye(40)
    gram[7, 7] = 100.0
    level = Codebooks(4, 1, outliers=0.02)
    (form,) = VPTQ()(site(32, 40), {"weight": weight}, {Gram(): gram}, level).hold.values()
    assert isinstance(form, Apart) and form.columns.tolist() == [7] and isinstance(form.few, Vectored)
    # 8 runs of 39 indices of 4 bits and 16 * 4 numbers; 16 runs of 1 bit and 2 * 2 numbers, since there are 16 vectors; the column's number
    assert form.nbytes == VPTQ().stored(site(32, 40), level) == (8 * 20 + 128) + (16 + 8) + 4
    assert form.few.vectors.width == 2


def test_vectors_across_groups_of_a_convolution():
    where = Site("a", Conv(), {"weight": TensorId("a.weight")}, (6, 2, 3, 3))
    gram = torch.eye(18).repeat(2, 1, 1)
    for width in (3, 4):
        (form,) = VPTQ()(where, {"weight": draw(6, 18).reshape(6, 2, 3, 3)}, {Gram(): gram}, Codebooks(width, 1)).hold.values()
        assert form.shape == (6, 2, 3, 3) and form.dense().isfinite().all()


def test_a_position_begins_within_reach_of_its_entry():
    """Entries 0 and 1; 0.9 held as 0 begins nine tenths of the way to 0.5, and 0.2 where it is."""
    table, wished = torch.tensor([[0.0], [1.0]]), torch.tensor([[[0.9], [0.2]]])
    torch.testing.assert_close(inside(wished, torch.tensor([[0, 0]]), table, None), torch.tensor([[[0.45], [0.2]]]))


@pytest.mark.parametrize(
    "level", [Codebooks(4, 1), Codebooks(2, 3, 1), Codebooks(2, 2, scaled=True), Codebooks(4, 1.5, 0.5, True, 0.1)], ids=str
)
@pytest.mark.parametrize("lesson", [Straight(), PV()], ids=["straight", "pv"])
def test_learned_vectors_begin_with_what_is_held(level, lesson):
    weight, gram = draw(30, 40), draw(40, 200, 1)
    (form,) = VPTQ()(site(30, 40), {"weight": weight}, {Gram(): gram @ gram.T / 200}, level).hold.values()
    for held, target in ((form, weight), (Transposed(form), weight.T)):
        soft = lesson.soften(held, target)
        assert soft is not None
        assert torch.equal(soft.dense(), held.dense()) and torch.equal(soft.harden().dense(), held.dense())
        (soft.dense() * draw(*target.shape, 2)).sum().backward()
        for name, p in soft.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name
            with torch.no_grad():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        torch.testing.assert_close(soft.dense(), soft.harden().dense(), rtol=1e-5, atol=1e-6)
        assert soft.harden().nbytes == held.nbytes


def test_entries_pass_their_gradient_to_the_table_and_to_positions():
    """Index 1 twice in three: its entry's gradient is the sum of both."""
    form = Vectored.of((1, 3), Vectors(1, 1), [torch.tensor([[1, 0, 1]])], [torch.tensor([[-1.0], [1.0]])], None)
    soft = form.soften(form.dense())
    assert isinstance(soft, Soft)
    (soft.dense() * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    grads = {name.rpartition(".")[2]: p.grad for name, p in soft.named_parameters()}
    # in units of the table's size, which is 1
    assert grads["table"].tolist() == [[10.0], [101.0]] and grads["position"].flatten().tolist() == [1, 10, 100]


# ---- codes exchanged one by one


def grouped(codes: list[list[int]]) -> Grouped:
    """4 rows of a grid of 2 bits in steps of 1 around 0, zero at code 2."""
    plain = torch.tensor(codes, dtype=torch.uint8)
    return Grouped.of(tuple(plain.shape), Grid(2, None, symmetric=True), plain, torch.ones(len(codes), 1), torch.full((len(codes), 1), 2.0))


def test_a_step_exchanges_the_greatest_updates_within_trust():
    """Weights 1, 1, 1, 1 of norm 2. Updates -.9, -.6, -.4 and 3: the last would go furthest but is at the top of the grid, two reach the
    next code, 1 away; the third rounds back."""
    coded = grouped([[3, 3, 3, 3]]).coded()
    update = torch.tensor([[-0.9, -0.6, -0.4, 3.0]])
    # within .4 of the norm, .8: no code may move
    assert exchanged(coded, update, 1.0, 0.4) == 0
    # within .5, 1: the greatest that moves
    assert exchanged(coded, update, 1.0, 0.5) == 1 and coded.harden().plain()[0].tolist() == [[2, 3, 3, 3]]
    coded = grouped([[3, 3, 3, 3]]).coded()
    assert exchanged(coded, update, 1.0, 1.0) == 2 and coded.harden().plain()[0].tolist() == [[2, 2, 3, 3]]
    # of a fourth of the groups only the one at the top is looked at, of half the next one too
    for share, flips in ((0.25, 0), (0.5, 1)):
        assert exchanged(grouped([[3, 3, 3, 3]]).coded(), update, share, 1.0) == flips


def test_vectors_and_levels_are_exchanged_as_well():
    table = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, -1.0], [0.0, 3.0]])
    coded = Vectored.of((4, 2), Vectors(2, 2), [torch.tensor([[1, 1], [2, 0]])], [table], None).coded()
    # (1, 1) + (0, -1.2) is nearest to (1, -1)
    update = torch.zeros(4, 2)
    update[1, 1] = -1.2
    assert exchanged(coded, update, 1.0, 1.0) == 1 and coded.harden().plain()[0].tolist() == [[1, 2], [2, 0]]
    levels = Leveled.of((1, 3), Levels(4, "e2m1", None), torch.tensor([[2, 0, 7]], dtype=torch.uint8), torch.tensor([[2.0]]), None, None)
    # 2 + 1.6 is 1.8 times the scale, nearest to 2, code 4
    coded = levels.coded()
    assert exchanged(coded, torch.tensor([[1.6, 0.0, 0.0]]), 1.0, 1.0) == 1 and coded.harden().plain()[0].tolist() == [[4, 0, 7]]


def test_nothing_is_kept_behind_a_code():
    """Two small proposals round back both times: what the first left over is gone. One large proposal moves."""
    soft = PV(share=1.0, trust=1.0).soften(grouped([[3, 3, 3, 3]]), torch.ones(1, 4))
    assert isinstance(soft, Revised)
    for proposed, codes in ((-0.4, [[3, 3, 3, 3]]), (-0.4, [[3, 3, 3, 3]]), (-0.6, [[2, 3, 3, 3]])):
        with torch.no_grad():
            soft.nudge[0, 0] = proposed
        soft.settle()
        assert not soft.nudge.any() and soft.harden().plain()[0].tolist() == codes  # type: ignore[attr-defined]
    assert soft.flips == 1


def test_revised_codes_of_a_sum_are_those_of_its_base():
    held = grouped([[3, 3, 3, 3]])
    soft = PV().soften(Sum(held, held), 2 * torch.ones(1, 4))
    assert soft is not None and [name for name, _ in soft.named_parameters()] == ["base.nudge", "base.inner.step"]


def test_levels_and_lessons_say_what_is_wrong():
    cases = (
        ({"width": 0}, "at least one weight"),
        ({"bits": 5}, "1 to 16 bits"),
        ({"residual": 2}, "not all"),
        ({"outliers": 1.0}, "below 1"),
    )
    for wrong, said in cases:
        with pytest.raises(ValueError, match=said):
            Codebooks(**wrong)
    with pytest.raises(ValueError, match="shares above 0"):
        PV(trust=0.0)
