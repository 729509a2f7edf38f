"""JLCM by hand: rows that are alike share a table, codes move to neighbours alone, what is stored is what was said."""

from __future__ import annotations

import pytest
import torch

from laconic.core.site import Linear, Site, TensorId
from laconic.methods.quantize.grid.clusters import Clustered, Mapped
from laconic.methods.quantize.round.jlcm import JLCM, Clusters, alike, fitted
from laconic.methods.quantize.train.proximal import Proximal

# rows 0 and 2 hold -1 and 1, rows 1 and 3 hold 10 and 14
WEIGHT = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [10.0, 10.0, 14.0, 14.0], [1.0, -1.0, -1.0, 1.0], [14.0, 10.0, 14.0, 10.0]])
SITE = Site("layer", Linear(), {"weight": TensorId("layer.weight")}, (4, 4))


def made(bits: int = 1, groups: int = 2) -> Clustered:
    (form,) = JLCM()(SITE, {"weight": WEIGHT}, {}, Clusters(bits, groups)).hold.values()
    return form


def test_rows_that_are_alike_are_in_one_cluster_whatever_their_order():
    member = alike(WEIGHT, 2)
    assert member[0] == member[2] != member[1] and member[1] == member[3]
    assert alike(WEIGHT, 1).tolist() == [0, 0, 0, 0]
    # as many clusters as there are kinds of rows, none empty
    assert sorted(alike(torch.ones(3, 5), 3).unique().tolist()) == [0]


def test_a_table_for_each_cluster_holds_its_values():
    member = torch.tensor([0, 1, 0, 1])
    codes, tables = fitted(WEIGHT, member, 1, 3)
    torch.testing.assert_close(tables, torch.tensor([[-1.0, 1.0], [10.0, 14.0], [0.0, 0.0]]), rtol=4e-3, atol=0)
    assert codes.tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 0]]


def test_the_form_and_its_bytes():
    form = made()
    torch.testing.assert_close(form.dense(), WEIGHT, rtol=4e-3, atol=0)
    torch.testing.assert_close(form.rows(torch.tensor([3, 0])), WEIGHT[[3, 0]], rtol=4e-3, atol=0)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(form.matmul(x), x @ form.dense().T, rtol=1e-5, atol=1e-5)
    # 4 rows of a byte, two tables of two, a byte a row for its cluster
    assert form.nbytes == 4 + 2 * 2 * 2 + 4 == JLCM().stored(SITE, Clusters(1, 2))
    # one codebook needs no word on clusters, and no matrix has more codebooks than rows
    assert made(groups=1).nbytes == 4 + 4 == JLCM().stored(SITE, Clusters(1, 1))
    assert made(groups=9).nbytes == JLCM().stored(SITE, Clusters(1, 9)) == 4 + 2 * 4 * 2 + 4
    for level in ((0, 2), (9, 2), (2, 0), (2, 257)):
        with pytest.raises(ValueError, match=r"bits=|groups="):
            Clusters(*level)


def test_a_step_goes_to_the_neighbour_that_it_makes_for_and_no_further():
    tables = torch.tensor([[0.0, 1.0, 3.0, 7.0]])
    form = Clustered.of((1, 3), torch.tensor([[1, 2, 3]], dtype=torch.uint8), tables, torch.tensor([0]))
    soft = Mapped(form, torch.tensor([[1.5, 2.0, 9.0]]))
    # half a gap to the right is held at 0.45, half of two to the left as well; what lies beyond the last entry goes that way
    torch.testing.assert_close(soft.position.detach(), torch.tensor([[1 + 0.25, 2 - 0.45, 3 + 0.45]]))
    (soft.dense() * torch.tensor([[1.0, -1.0, -1.0]])).sum().backward()
    # down from 1 is 1 away, up from 3 is 4 away, up from the last is nothing
    assert soft.position.grad.tolist() == [[1.0, -4.0, 0.0]]
    with torch.no_grad():
        soft.position.copy_(torch.tensor([[5.0, 0.2, 3.0]]))
    soft.settle()
    assert soft.position.tolist() == [[2.0, 1.0, 3.0]]
    assert soft.harden().dense().tolist() == [[3.0, 1.0, 7.0]]


def test_entries_have_the_gradient_of_the_weights_that_hold_them_and_stay_rising():
    form = Clustered.of((1, 4), torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8), torch.tensor([[-1.0, 1.0]]), torch.tensor([0]))
    soft = Proximal().soften(form, form.dense())
    (soft.dense() * torch.tensor([[1.0, 2.0, 4.0, 8.0]])).sum().backward()
    torch.testing.assert_close(soft.entries.table.grad, torch.tensor([[9.0, 6.0]]))
    with torch.no_grad():
        soft.entries.table.copy_(torch.tensor([[2.0, -2.0]]))
    assert soft.entries().tolist() == [[-2.0, 2.0]] and soft.harden().tables.tolist() == [[-2.0, 2.0]]


def test_a_code_is_exchanged_for_the_nearest_in_its_own_table():
    coded = made(bits=1).coded()
    # row 0 knows -1 and 1, row 1 knows 10 and 14
    codes, weights = coded.nearest(torch.tensor([0, 4]), torch.tensor([[0.5], [12.5]]))
    assert codes.tolist() == [1, 1]
    torch.testing.assert_close(weights.detach(), torch.tensor([[1.0], [14.0]]), rtol=4e-3, atol=0)
    coded.exchange(torch.tensor([0, 4]), codes)
    expected = WEIGHT.clone()
    expected[0, 0], expected[1, 0] = 1.0, 14.0
    torch.testing.assert_close(coded.harden().dense(), expected, rtol=4e-3, atol=0)
