"""Index maps, members and edges by hand."""

from __future__ import annotations

import torch

from laconic.core.packed import Dense, Held, Transposed, restore
from laconic.core.site import Edge, Embedding, IndexMap, Linear, Member, Rotate, Scale, Site, TensorId


def test_an_index_map_gives_only_what_the_member_has() -> None:
    # 16 channels that stand in the middle of 64
    narrow = IndexMap(16, offset=-24)
    assert [list(narrow(i)) for i in (23, 24, 39, 40)] == [[], [0], [15], []]
    # heads of eight
    assert list(IndexMap(32, block=8)(3)) == [24, 25, 26, 27, 28, 29, 30, 31]
    # the last of ten columns is half a block
    assert list(IndexMap(10, block=4)(2)) == [8, 9]
    # gate and up in one tensor of six rows
    fused = IndexMap(6, table=((0, 3), (1, 4), (2, 5)))
    assert [tuple(fused(i)) for i in range(3)] == [(0, 3), (1, 4), (2, 5)]


def test_the_axis_of_a_transposed_weight_is_the_other_one() -> None:
    plain = Site("a", Linear(), {"weight": TensorId("a.weight")}, (3, 2))
    turned = plain._replace(transposed=True)
    table = Site("t", Embedding(), {"weight": TensorId("t.weight")}, (9, 2))
    assert [Member(site, 0, IndexMap(3)).stored_axis for site in (plain, turned, table)] == [0, 1, 0]
    assert turned.matrix == (3, 2)


def test_an_edge_says_how_it_may_be_edited() -> None:
    edge = Edge("x", 4, 2, (), (), allows=(Scale(positive=True),))
    assert edge.may(Scale) == Scale(positive=True)
    assert edge.may(Rotate) is None


def test_a_transposed_form_computes_what_the_layer_did() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(3, 5)
    form = Transposed(Dense(layer.weight.detach().T.contiguous()))
    assert form.shape == (5, 3)
    assert form.nbytes == 60
    assert torch.equal(form.dense(), layer.weight)
    again = restore(form.describe(), form.tensors())
    assert torch.equal(again.rows(slice(1, 3)), layer.weight[1:3])
    held, x = Held(form, layer, layer.bias), torch.randn(2, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(held(x), layer(x))
        held.thaw(torch.float32)
        torch.testing.assert_close(held(x), layer(x))


def test_a_table_that_scales_its_rows_is_held_with_its_scale() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    table = GemmaTextScaledWordEmbedding(7, 4, 0, embed_scale=2.5)
    held, at = Held(Dense(table.weight.detach()), table, None), torch.tensor([[1, 6]])
    with torch.no_grad():
        torch.testing.assert_close(held(at), table(at))
        held.thaw(torch.float32)
        torch.testing.assert_close(held(at), table(at))
